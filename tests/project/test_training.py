"""The pieces of the recipe that can be wrong without anyone noticing: schedules, noise ranges, averages, data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from training import (
    architecture,
    assemble,
    difference,
    distance,
    experts,
    loop,
    muon,
    pictures,
    rollouts,
    text,
    vae,
)
from training.vae import read_vae
from wanlab import models
from wanlab.heldout import cases as heldout
from wanlab.heldout import clips


def test_each_expert_learns_only_its_own_noise_range():
    high, low = (experts.draw_sigma(name, 20000, torch.device("cpu")) for name in ("high", "low"))
    assert high.min() >= architecture.BOUNDARY_RATIO - 1e-6
    assert low.max() <= architecture.BOUNDARY_RATIO + 1e-6
    assert high.max() <= 1
    assert low.min() >= 0
    assert high.max() > 0.999
    assert low.min() < 0.01


def test_noise_levels_are_those_that_sampling_visits():
    """The scheduler's own sigmas lie on the curve the training draws from."""
    scheduler = architecture.scheduler()
    scheduler.set_timesteps(architecture.STEPS)
    sigmas = scheduler.sigmas[:-1]
    drawn = torch.cat([experts.draw_sigma(name, 50000, torch.device("cpu")) for name in ("high", "low")])
    for sigma in sigmas[sigmas < 0.999]:
        assert (drawn - sigma).abs().min() < 1e-2
    assert int((sigmas >= architecture.BOUNDARY_RATIO).sum()) == 4


def test_a_small_checkpoint_without_a_base_holds_the_weights_themselves(tmp_path):
    weights = {"a": torch.randn(5, 3, 2), "b": torch.randn(4)}
    difference.write({"weights": weights}, None, tmp_path / "small.npz")
    for name, tensor in difference.read(tmp_path / "small.npz")["weights"].items():
        largest = weights[name].reshape(len(tensor), -1).abs().amax(dim=1)
        assert tensor.shape == weights[name].shape
        assert bool(
            ((tensor - weights[name]).reshape(len(tensor), -1).abs().amax(dim=1) <= largest / 250).all()
        )


def test_muon_steps_as_that_of_pytorch():
    """All matrices of a shape at once, as one by one: to the rounding of bfloat16."""
    ends = []
    for make in (
        lambda p: muon.Muon(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 24), (24, 8), (8, 8))]
        optimizer = make(parameters)
        for _ in range(3):
            optimizer.zero_grad()
            sum((p.square() * torch.randn(p.shape)).sum() for p in parameters).backward()
            optimizer.step()
        ends.append([p.detach() for p in parameters])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    module = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)]), "head": torch.nn.Linear(4, 2)}
    )
    args = loop.parser("", batch=1, lr=1e-3, log_every=1).parse_args(["--steps", "1", "--muon", "0.002"])
    (adamw, _), (matrices, rate) = loop.optimizers(module, args, 0.02, fused=False)
    assert rate == 0.002
    assert [p for group in matrices.param_groups for p in group["params"]] == [module["blocks"][0].weight]
    assert len([p for group in adamw.param_groups for p in group["params"]]) == 3


def test_captions_of_other_clips():
    text = torch.arange(2000.0).view(-1, 1, 1)
    assert torch.equal(experts.misplaced(text, 0.0), text)
    torch.manual_seed(0)
    given = experts.misplaced(text, 0.75)
    assert 0.7 < (given != text).float().mean() < 0.8


def test_learning_rate_rises_then_falls():
    rates = [loop.cosine(x / 100) for x in range(101)]
    assert rates[0] < rates[2]
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


def test_average_stands_in_for_the_parameters_and_leaves():
    module = torch.nn.Linear(2, 2)
    average = loop.Average(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(3.0)
    average.update(module)
    with torch.no_grad():
        module.weight.fill_(5.0)
    with average.in_place_of(module):
        assert bool((module.weight != 5).all())
    assert torch.equal(module.weight, torch.full((2, 2), 5.0))


def trained(out, *options: str, saved_at: int | None = None) -> torch.Tensor:
    """Averaged weights of a small regression after 12 steps, or an interruption two steps after a checkpoint."""
    args = loop.parser("", batch=4, lr=0.1, log_every=4).parse_args(
        ["--out", str(out), "--steps", "12", "--no-compile", *options]
    )
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    training = loop.Loop("line", module, args, loop.Ranks(), average_decay=0.9, weight_decay=0.01)

    def losses(progress: float):
        if saved_at is not None and training.step == saved_at:
            training.save()
        if saved_at is not None and training.step == saved_at + 2:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(training.step))
        return (module(x) - x.sum(dim=1, keepdim=True)).square().mean(), {"progress": progress}

    training.run(losses)
    return loop.load_weights(torch.nn.Linear(3, 1), out / "line.pt")["weights"]["weight"]


def test_a_stage_of_matrices_goes_on_as_if_nothing_had_happened(tmp_path):
    def end(*options: str, steps: int) -> torch.Tensor:
        args = loop.parser("", batch=1, lr=0.1, log_every=9).parse_args(
            ["--out", str(tmp_path), "--steps", "6", "--no-compile", "--muon", "0.05", *options]
        )
        torch.manual_seed(0)
        module = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
        training = loop.Loop("blocks", module, args, loop.Ranks(), average_decay=0.9, weight_decay=0.01)

        def losses(progress: float):
            if training.step == steps:
                training.save()
                raise KeyboardInterrupt
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(training.step))
            return (module["blocks"][0](x) - x.flip(1)).square().mean(), {}

        with contextlib.suppress(KeyboardInterrupt):
            training.run(losses)
        return module["blocks"][0].weight.detach()

    whole = end(steps=99)
    end(steps=3)
    assert torch.equal(end("--resume", steps=99), whole)


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halves", saved_at=7)
    resumed = trained(tmp_path / "halves", "--resume")
    assert torch.equal(whole, resumed)
    rows = [json.loads(row) for row in (tmp_path / "halves" / "line.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8]


def test_a_new_run_begins_a_new_curve(tmp_path):
    trained(tmp_path)
    trained(tmp_path)
    assert len((tmp_path / "line.jsonl").read_text().splitlines()) == 3


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing to resume"):
        trained(tmp_path, "--resume")


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no checkpoint .*vae_joint\.pt"):
        vae.main(["decoder", "--steps", "1", "--out", str(tmp_path)])


def test_pictures_give_clips_and_captions_from_a_seed():
    first, second = (pictures.Pictures(torch.device("cpu"), 7, 0).batch(3, 5) for _ in range(2))
    assert first[0].shape == (3, 3, 5, architecture.HEIGHT, architecture.WIDTH)
    assert first[1] == second[1]
    assert torch.equal(first[0], second[0])
    assert first[0].abs().max() <= 1


@pytest.mark.parametrize(("height", "width", "frames"), [(128, 192, 17), (192, 288, 25), (256, 384, 33)])
def test_pictures_give_clips_of_every_size_with_up_to_three_shapes(height, width, frames):
    random = np.random.default_rng(0)
    photographs = [random.integers(256, size=(320, 480, 3), dtype=np.uint8) for _ in range(2)]
    made = pictures.Pictures(torch.device("cpu"), 3, 0, photographs=photographs, objects=(0, 0, 1, 1))
    video, captions = made.batch(4, None, height, width, per_picture=1)
    assert video.shape == (4, 3, frames, height, width)
    assert -1 <= video.min() < -0.5 < 0.5 < video.max() <= 1
    assert {caption.count(" moves ") for caption in captions} == {2, 3}
    short, _ = made.batch(1, 5, height, width)
    assert short.shape == (1, 3, 5, height, width)


def test_textures_are_learned_from_in_the_share_asked_for():
    made = pictures.Pictures(
        torch.device("cpu"), 3, 0, photographs=[np.zeros((600, 600, 3), np.uint8)], textures=0.5
    )
    drawn = [made._picture((200, 250)) for _ in range(40)]
    assert 12 <= sum(bool(picture.std() > 0) for picture in drawn) <= 28
    video, _ = made.batch(2, 3, 64, 96)
    assert video.shape == (2, 3, 3, 64, 96)


def test_own_photographs_are_shown_smaller_only_as_far_as_they_are_large_enough():
    large, small = (np.zeros((side, side, 3), np.uint8) for side in (800, 300))
    sides = {}
    for name, photograph in (("large", large), ("small", small)):
        made = pictures.Pictures(torch.device("cpu"), 0, 0, photographs=[photograph])
        sides[name] = [made._picture((384, 512)).shape[1] for _ in range(20)]
    assert 512 <= min(sides["large"]) < 600 < 700 < max(sides["large"]) <= 800
    assert set(sides["small"]) == {300}


def test_dead_leaves_are_pictures():
    images = pictures.dead_leaves_images(
        2, torch.Generator().manual_seed(0), torch.device("cpu"), size=64, leaves=30
    )
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.05


def test_gradient_loss_sees_blur_and_not_brightness():
    picture = torch.rand(1, 3, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool3d(picture, (1, 3, 3), stride=1, padding=(0, 1, 1))
    assert distance.gradient_loss(picture + 0.5, picture) < 1e-5
    assert distance.gradient_loss(blurred, picture) > 0.05


def test_the_longest_caption_has_room_and_no_unknown_word():
    generator, tokenizer = np.random.default_rng(0), architecture.tokenizer()
    captions, labels = text.draw(generator, 300, most_objects=3)
    assert labels.shape == (300, 10)
    assert {caption.count(" moves ") for caption in captions} == {0, 1, 2, 3}
    for caption, label in zip(captions, labels, strict=True):
        kinds, colours = label[1::3], label[2::3]
        assert int((kinds > 0).sum()) == caption.count(" moves ")
        named = colours[colours > 0].tolist()
        assert len(set(named)) == len(named)
        tokens = tokenizer(caption).input_ids
        assert len(tokens) <= architecture.TEXT_TOKENS
        assert tokenizer.unk_token_id not in tokens


def test_latents_are_those_of_the_pipeline(root):
    encode = experts.Encoder(root / "data" / "wan-nano", torch.device("cpu"))
    clip = clips.Clip("pan_left", 300.0, 150.0, 0.5)
    video = torch.from_numpy(heldout.render_clip("coffee.png", clip, 5, 32, 48)).permute(3, 0, 1, 2)[None]
    latents = encode(video * 2 - 1)
    vae, mean, std = read_vae(root / "data" / "wan-nano")
    with torch.no_grad():
        expected = vae.encode(video * 2 - 1).latent_dist.mode()
    expected = (expected - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    assert latents.dtype == torch.float16
    assert torch.allclose(latents.float(), expected, atol=5e-3)


def test_a_vae_without_statistics_of_its_latents_is_refused(tmp_path):
    torch.save({"weights": architecture.vae().state_dict()}, tmp_path / "vae_joint.pt")
    with pytest.raises(SystemExit, match="states no mean and spread"):
        read_vae(tmp_path / "vae_joint.pt")


def test_what_is_drawn_ahead_comes_in_order_and_its_errors_are_seen():
    numbers = iter(range(3))
    ahead = experts.Ahead(lambda: (torch.zeros(1), next(numbers)), torch.device("cpu"))
    assert [ahead()[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration):
        ahead()
    ahead.close()


def test_each_size_has_one_graph_without_a_break():
    counter = CompileCounter()
    forward = torch.compile(architecture.expert("next"), dynamic=False, backend=counter)
    for batch, shape in ((2, (2, 4, 6)), (1, (3, 8, 12)), (2, (2, 4, 6)), (1, (3, 8, 12))):
        text_states = torch.zeros(batch, architecture.TEXT_TOKENS, architecture.TEXT_DIM)
        forward(torch.zeros(batch, 36, *shape), torch.full((batch,), 900.0), text_states)
    assert counter.frame_count == 2


def test_a_wider_expert_begins_as_the_one_it_goes_on_from():
    torch.manual_seed(0)
    narrow, wide = architecture.expert("next"), architecture.expert("wide")
    wide.load_state_dict(architecture.widened(narrow.state_dict(), wide))
    asked = torch.randn(1, 36, 2, 4, 6), torch.tensor([700.0]), torch.randn(1, 24, architecture.TEXT_DIM)
    with torch.no_grad():
        outputs = [expert(*asked, return_dict=False)[0] for expert in (narrow, wide)]
    assert torch.allclose(*outputs, atol=1e-5)
    inner = wide.blocks[0].ffn.net[0].proj.weight
    assert inner[320:].std() > 0.01
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(architecture.widened(architecture.expert().state_dict(), wide))


class Knowing(torch.nn.Module):
    """An expert that knows the clip, as its condition is the clip."""

    def forward(self, inputs, time, text, return_dict):
        noisy, clip = inputs[:, :16], inputs[:, 20:]
        return ((noisy - clip) / (time / 1000).view(-1, 1, 1, 1, 1),)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_latents_that_experts_sample_are_on_the_way_to_their_clip(expert):
    torch.manual_seed(0)

    def draw(count):
        clips = torch.randn(count, 16, 3, 8, 12)
        return clips, clips, torch.zeros(count, 4, 8)

    low = Knowing() if expert == "low" else None
    own = rollouts.Rollouts(Knowing(), low, draw, torch.zeros(1, 4, 3, 8, 12), torch.zeros(4, 8), 4)
    seen = set()
    for _ in range(40):
        states = own(4)
        level = states.sigma.view(-1, 1, 1, 1, 1)
        assert torch.all((states.sigma >= 0.9) if expert == "high" else (states.sigma < 0.9))
        noise = (states.noisy - (1 - level) * states.latents) / level
        assert noise.std() == pytest.approx(1, abs=0.05)
        seen |= {round(float(sigma), 2) for sigma in states.sigma}
    ten_steps = {"high": {0.98, 0.95, 0.92}, "low": {0.68, 0.36}}[expert]
    assert ten_steps <= seen


def test_a_network_follows_a_checkpoint_that_is_written_beside_it(tmp_path):
    path, network = tmp_path / "expert_high.pt", torch.nn.Linear(1, 1, bias=False)
    write = lambda value: torch.save({"weights": {"weight": torch.full((1, 1), value)}}, path)  # noqa: E731
    write(1.0)
    followed = experts.Followed(network, path)
    before = float(network.weight)
    followed()  # what was there before is an earlier run's
    assert float(network.weight) == before
    write(2.0)
    os.utime(path, ns=(0, followed.read_ns + 1))
    followed()
    assert float(network.weight) == 2.0


@pytest.mark.slow
def test_experts_learn_from_two_sizes_and_become_a_model(tmp_path, root, monkeypatch):
    monkeypatch.setattr(experts, "SIZES", {"small": (32, 48, 5), "large": (64, 96, 9)})
    text.train(steps=1, seed=0)[0].save_pretrained(tmp_path / "text_encoder")
    common = ["--out", str(tmp_path), "--vae", str(root / "data" / "wan-nano"), "--architecture", "next"]
    tiny = ["--clips", "4", "--chunk", "2", "--large-clips", "2", "--large-chunk", "1", "--batch", "2"]
    tiny += ["--large-batch", "1", "--dead-leaves", "0", "--refresh-every", "2", "--log-every", "1"]
    for expert in ("high", "low"):
        experts.main([expert, *common, *tiny, "--steps", "6", "--large-share", "0.5", "--textures", "0.5"])
    rows = [json.loads(row) for row in (tmp_path / "expert_low.jsonl").read_text().splitlines()]
    assert {row["height"] for row in rows} == {32, 64}
    facts = json.loads((tmp_path / "expert_low.json").read_text())
    assert sum(facts["steps_of_this_run"].values()) == facts["steps"] == 6
    assert set(facts["before_s"]) == {"encoding 4 small clips", "encoding 2 large clips"}
    experts.main(["low", *common, *tiny, "--steps", "8", "--resume"])
    assert json.loads((tmp_path / "expert_low.json").read_text())["steps_of_this_run"] == {"small": 2}

    wide = tmp_path / "wide"
    shutil.copytree(tmp_path / "text_encoder", wide / "text_encoder")
    seen = ["--seen", "0.5", "--seen-from", "0.5", "--seen-clips", "1", "--backbone", "stlpips-alex"]
    seen += [
        "--rollouts",
        "2",
        "--large-rollouts",
        "1",
        "--batch",
        "6",
        "--large-batch",
        "6",
        "--out",
        str(wide),
    ]
    for expert in ("high", "low"):
        start = ["--architecture", "wide", "--start", str(tmp_path / f"expert_{expert}.pt")]
        experts.main([expert, *common[2:4], *tiny, *start, *seen, "--steps", "4", "--large-share", "0.5"])
        rows = [json.loads(row) for row in (wide / f"expert_{expert}.jsonl").read_text().splitlines()]
        assert [("stlpips-alex" in row) for row in rows] == [False, False, True, True]

    folder = tmp_path / "model"
    assemble.main(["--checkpoints", str(tmp_path), "--folder", str(folder), *common[2:]])
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24e6
    model = models.load(folder, device="cpu", dtype="float32")
    assert model.pipeline.transformer.config.attention_head_dim == 64
    usual = models.get("wan-nano").defaults
    assert model.spec.defaults == dataclasses.replace(usual, other_sizes=((256, 384, 33),))
    published = models.load("wan-nano", device="cpu", dtype="float32")
    for name, tensor in published.pipeline.vae.state_dict().items():
        assert torch.equal(model.pipeline.vae.state_dict()[name], tensor)
    assert model.pipeline.vae.config.latents_std == published.pipeline.vae.config.latents_std
    video = model.generate(np.zeros((64, 96, 3)), "the camera is still", height=64, width=96, frames=9).video
    assert video.shape == (9, 64, 96, 3)


@pytest.mark.slow
def test_text_encoder_learns_the_captions_in_seconds():
    _, accuracy = text.train(steps=120, seed=0)
    assert accuracy > 0.9


def test_a_small_checkpoint_is_the_weights_within_a_step_of_its_scale(tmp_path):
    base, changed, mean = tmp_path / "base.safetensors", torch.nn.Linear(8, 4), torch.tensor([0.25, -3.0])
    first = {name: tensor.detach().half() for name, tensor in torch.nn.Linear(8, 4).state_dict().items()}
    save_file(first, base)
    difference.write({"weights": changed.state_dict(), "mean": mean}, base, tmp_path / "small.npz")
    read = torch.nn.Linear(8, 4)
    assert torch.equal(loop.load_weights(read, tmp_path / "small.npz")["mean"], mean)
    step = (changed.weight - first["weight"].float()).abs().amax(dim=1, keepdim=True) / difference.LEVELS
    assert bool(((read.weight - changed.weight).abs() <= 0.51 * step).all())
    save_file({name: tensor + 1 for name, tensor in first.items()}, base)
    with pytest.raises(SystemExit, match="holds other weights now"):
        difference.read(tmp_path / "small.npz")


def test_the_small_checkpoint_in_the_tree_is_of_the_vae(root, monkeypatch):
    monkeypatch.chdir(root)
    _, mean, std = vae.read_vae(root / "training/start/vae.npz")
    assert mean.shape == std.shape == (architecture.LATENT_CHANNELS,)
    assert bool((std > 0).all())
