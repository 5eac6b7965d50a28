"""The kernel of self-attention: the same video by each, the choice among them, and faults that the proof has to see."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.models.variants import compile_blocks
from wanlab.techniques.attention import choice
from wanlab.techniques.attention.errors import LIMITS, attention_error, exact_attention, sampled_queries
from wanlab.techniques.attention.kernels import KERNELS, Kernel
from wanlab.techniques.attention.sites import SiteProcessor
from wanlab.techniques.attention_kernel import KernelName

ON_CPU = ("sdpa-math", "sdpa-flash")


def drawn(tokens=300, heads=2, size=32, dtype=torch.float32, batch=1):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, size, generator=draw).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_kernel_differs_from_another_by_rounding(bench, kernel):
    switched, video = bench.switched_on({"attention_kernel": {"kernel": kernel}})
    assert bench.far(video) < 1e-5
    proof = switched.proofs()["attention_kernel"]
    assert proof.passed
    blocks = len(bench.model.component("expert_high").blocks)
    calls = 4 * blocks  # two steps of two branches on each expert
    assert f"{calls} of {calls} of the high-noise expert ({kernel} {calls})" in proof.sentence
    assert f"{calls} of {calls} of the low-noise expert ({kernel} {calls})" in proof.sentence
    assert f"{kernel} is {kernel.removeprefix('sdpa-')} in a profile" in proof.sentence


def test_projections_norms_and_rotary_embedding_stay_those_of_diffusers_bit_for_bit(bench):
    _, video = bench.switched_on({"attention_kernel": {"kernel": "sdpa-flash"}})
    assert (video == bench.video).all()  # flash is what PyTorch takes on a CPU by itself
    network = bench.model.component("expert_high")
    assert not isinstance(network.blocks[0].attn1.processor, SiteProcessor)
    assert (bench.generate(bench.model) == bench.video).all()


def test_auto_takes_a_kernel_once_for_a_shape_and_remembers_it(bench, monkeypatch):
    measured, time_ms = [], choice.time_ms
    monkeypatch.setattr(
        choice, "time_ms", lambda *given, **named: measured.append(1) or time_ms(*given, **named)
    )
    choice.remembered_file().unlink(missing_ok=True)
    switched, video = bench.switched_on({"attention_kernel": None})
    assert bench.far(video) < 1e-5
    (made,) = switched.techniques[0].layer.choices.values()
    assert made.kernel in ON_CPU
    assert made.measured_here
    assert made.error <= made.limit == LIMITS["float32"]
    assert len(measured) == len(ON_CPU)  # the first call of all, and no later one
    reasons = {each.kernel: each.reason for each in made.candidates}
    assert [name for name, reason in reasons.items() if not reason] == list(ON_CPU)
    assert reasons["flash-attention-3"].startswith("it needs an NVIDIA GPU (compute capability 9.0)")
    assert "is the fastest of 2 that are exact here (error " in switched.proofs()["attention_kernel"].sentence
    again, _ = bench.switched_on({"attention_kernel": None})
    (kept,) = again.techniques[0].layer.choices.values()
    assert len(measured) == len(ON_CPU)
    assert (kept.kernel, kept.candidates, kept.measured_here) == (made.kernel, made.candidates, False)
    (key,) = json.loads(choice.remembered_file().read_text())
    assert "float32, 1x48x" in key
    bench.switched_on({"attention_kernel": None}, width=64)
    assert len(measured) == 2 * len(ON_CPU)  # another shape is another choice


def test_auto_takes_no_kernel_that_is_not_exact(monkeypatch):
    exact = KERNELS["sdpa-flash"].run

    def wrong(query, key, value):
        return 1.02 * exact(query, key, value)

    choice.remembered_file().unlink(missing_ok=True)
    monkeypatch.setitem(KERNELS, "sdpa-flash", Kernel("sdpa-flash", wrong, cpu=True))
    made = choice.choose(*drawn())
    assert made.kernel == "sdpa-math"
    reason = {each.kernel: each.reason for each in made.candidates}["sdpa-flash"]
    assert reason == "its error 0.02 is above 1e-05"
    monkeypatch.setitem(KERNELS, "sdpa-math", Kernel("sdpa-math", wrong, cpu=True))
    choice.remembered_file().unlink()
    with pytest.raises(
        WanlabError, match=r"no kernel for attention is exact enough here \(sdpa-math: its error 0.02"
    ):
        choice.choose(*drawn())


def test_auto_finds_a_kernel_where_scores_are_peaked(bench):
    query, key, value = drawn(dtype=torch.bfloat16)
    made = choice.choose(30 * query, key, value)
    assert made.error <= made.limit
    model = models.load("wan-nano", device="cpu", dtype="bfloat16")
    switched = techniques.switch_on(model, ["attention_kernel"])
    bench.generate(switched.model, steps=2)
    assert switched.proofs()["attention_kernel"].passed


def test_a_file_of_choices_that_cannot_be_read_is_made_again():
    choice.remembered_file().parent.mkdir(parents=True, exist_ok=True)
    choice.remembered_file().write_text("{not json")
    assert choice.choose(*drawn()).measured_here
    assert not choice.choose(*drawn()).measured_here


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1e-4), (torch.float32, 1e-9)])
def test_the_error_is_that_of_a_plain_computation_in_float64(dtype, least):
    query, key, value = drawn(dtype=dtype, batch=2)
    picked = sampled_queries(300)
    scores = torch.einsum("blhd,bmhd->bhlm", query.double(), key.double()) / 32**0.5
    plain = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value.double())
    exact = exact_attention(query, key, value, picked)
    assert torch.allclose(exact, plain[:, picked], rtol=1e-10, atol=1e-12)
    error = attention_error(KERNELS["sdpa-math"].run, query, key, value)
    assert least < error < LIMITS[str(dtype).removeprefix("torch.")]


def test_the_table_of_kernels_is_that_of_the_setting():
    assert ("auto", *KERNELS) == get_args(KernelName)


def capable(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "size", "lacks"),
    [
        (
            "flash-attention-3",
            (9, 0),
            torch.bfloat16,
            128,
            "the package of flash-attention-3: pip install fa3-fwd",
        ),
        (
            "flash-attention-3",
            (8, 9),
            torch.bfloat16,
            128,
            "compute capability 9.0 for flash-attention-3; this one has 8.9",
        ),
        (
            "flash-attention-3",
            (9, 0),
            torch.float16,
            128,
            "a model in bfloat16 for flash-attention-3, not float16",
        ),
        ("flash-attention-4", (8, 0), torch.bfloat16, 128, "compute capability 9.0 to 11.9"),
        ("flash-attention-4", (10, 0), torch.bfloat16, 256, "heads of 8 to 128 channels"),
        (
            "sage",
            (8, 9),
            torch.bfloat16,
            32,
            "heads of 64 to 128 channels, a multiple of 32, for sage; this model has 32",
        ),
        ("sage", (7, 5), torch.float16, 128, "compute capability 8.0 or later for sage; this one has 7.5"),
        ("sdpa-flash", (7, 5), torch.float16, 128, "compute capability 8.0 or later"),
        (
            "sdpa-cudnn",
            (9, 0),
            torch.float32,
            128,
            "a model in bfloat16 or float16 for sdpa-cudnn, not float32",
        ),
        ("sdpa-efficient", (7, 5), torch.float16, 128, ""),
        ("sdpa-cudnn", (9, 0), torch.bfloat16, 128, ""),
    ],
)
def test_what_a_kernel_lacks_depends_on_gpu_package_dtype_and_head(
    monkeypatch, kernel, capability, dtype, size, lacks
):
    capable(monkeypatch, capability)
    found = KERNELS[kernel].lacks(torch.device("cuda"), dtype, size)
    assert lacks in found
    assert bool(lacks) == bool(found)


def test_what_cannot_run_here_says_what_would_bring_it(bench):
    with pytest.raises(
        WanlabError,
        match=r"attention_kernel cannot run here: it needs an NVIDIA GPU \(compute capability 9.0\)",
    ):
        techniques.switch_on(bench.model, {"attention_kernel": {"kernel": "flash-attention-3"}})
    with pytest.raises(WanlabError, match="Invalid enum value 'flash'"):
        techniques.switch_on(bench.model, {"attention_kernel": {"kernel": "flash"}})
    other = models.load("tiny-ltx-t2v", weights="random", device="cpu")
    with pytest.raises(WanlabError, match="it needs a WanTransformer3DModel, whose blocks it knows"):
        techniques.switch_on(other, ["attention_kernel"])


def test_a_kernel_of_8_bits_is_a_lossy_one():
    tier = {
        name: techniques.made({"attention_kernel": {"kernel": name}})[0].tier for name in get_args(KernelName)
    }
    assert {name for name, each in tier.items() if each == "lossy"} == {"sage"}
    assert {name for name, kernel in KERNELS.items() if kernel.rounds} == {"sage"}


@pytest.mark.parametrize("name", ["tiny-wan2.1-i2v", "tiny-wan2.2-t2v", "tiny-wan2.2-ti2v"])
def test_the_other_models_of_the_family_attend_by_it_too(name):
    model = models.load(name, weights="random", device="cpu")
    image = (
        torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
        if model.conditions
        else None
    )
    settings = {"height": 64, "width": 64, "frames": 5, "steps": 2, "output": "latent"}
    original = model.generate(image, "a cat", **settings).video
    switched = techniques.switch_on(model, {"attention_kernel": {"kernel": "sdpa-flash"}})
    assert (switched.model.generate(image, "a cat", **settings).video == original).all()
    assert switched.proofs()["attention_kernel"].passed


@pytest.mark.slow
def test_a_compiled_block_calls_the_kernel_too_and_is_compiled_once(bench, tmp_path):
    torch._dynamo.reset()
    text = (
        "name: mine\nengines: {expert_high: compiled, expert_low: compiled}\ntechniques: [attention_kernel]\n"
    )
    settings = {name: value for name, value in (("height", 64), ("width", 96), ("frames", 5), ("steps", 4))}
    used = configuration.configure(
        bench.model, configuration.parse_configuration(text), tmp_path, **settings, progress=False
    )
    assert used.effect == "applied"
    assert "24 of 24 of the high-noise expert" in used.proof
    plain = compile_blocks(bench.model)
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    assert bench.far(bench.generate(plain)) < 1e-4
    graphs_of_plain, before = counter["unique_graphs"] - before, counter["unique_graphs"]
    assert bench.far(bench.generate(used.model)) < 1e-4
    assert counter["unique_graphs"] - before <= max(graphs_of_plain, 2)


# Planted faults.


def test_a_kernel_on_one_expert_only_is_seen(bench):
    switched = techniques.switch_on(bench.model, {"attention_kernel": {"kernel": "sdpa-flash"}})
    originals = bench.model.component("expert_low").blocks
    for block, original in zip(switched.model.component("expert_low").blocks, originals, strict=True):
        block.attn1.processor = original.attn1.processor
    bench.generate(switched.model)
    proof = switched.proofs()["attention_kernel"]
    assert (proof.passed, proof.sentence) == (
        False,
        "attention_kernel is not everywhere: 24 of 24 attentions of the low-noise expert were computed elsewhere.",
    )


def test_a_kernel_that_answers_nothing_is_seen(bench):
    switched = techniques.switch_on(bench.model, {"attention_kernel": {"kernel": "sdpa-flash"}})
    for block in switched.model.component("expert_high").blocks:
        block.attn1.processor.site.layers.clear()
    bench.generate(switched.model)
    proof = switched.proofs()["attention_kernel"]
    assert not proof.passed
    assert (
        proof.sentence
        == "attention_kernel computed no attention of the high-noise expert; default computed all 24."
    )


def test_another_kernel_than_the_one_that_was_asked_for_is_seen(bench, monkeypatch):
    planted = Kernel("sdpa-flash", KERNELS["sdpa-math"].run, cpu=True)
    monkeypatch.setitem(KERNELS, "sdpa-flash", planted)
    switched, _ = bench.switched_on({"attention_kernel": {"kernel": "sdpa-flash"}})
    proof = switched.proofs()["attention_kernel"]
    assert (proof.passed, proof.sentence) == (False, "attention_kernel asked for sdpa-flash, and math ran.")
