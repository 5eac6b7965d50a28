"""The attention map of families other than Wan: equal to a full computation from what PyTorch's kernel gets."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from wanlab import diagnose, models, plots
from wanlab.core.errors import WanlabError
from wanlab.diagnose.attention import backends, calls
from wanlab.heldout import cases as heldout
from wanlab.models.families.base import Family

pytestmark = pytest.mark.slow

BOTH, ONE = ("cond", "uncond"), ("cond",)
FAMILIES = {
    # Layers, branches, where the text of joint attention stands.
    "tiny-wan2.2-i2v": (2, BOTH, None),
    "tiny-wan2.1-i2v": (2, BOTH, None),
    "tiny-wan2.2-ti2v": (2, BOTH, None),
    "tiny-vace": (3, BOTH, None),
    "tiny-animate": (2, ONE, None),
    "tiny-skyreels-i2v": (2, BOTH, None),
    "tiny-ltx-t2v": (2, BOTH, None),
    "tiny-ltx-i2v": (2, BOTH, None),
    "tiny-cogvideox-t2v": (2, BOTH, "first"),
    "tiny-cogvideox-i2v": (2, BOTH, "first"),
    "tiny-cogvideox1.5-i2v": (2, BOTH, "first"),
    "tiny-hunyuan-t2v": (4, ONE, "last"),
    "tiny-hunyuan-i2v": (4, ONE, "last"),
    "tiny-mochi": (2, BOTH, "last"),
}
BATCHED = ("ltx", "cogvideox", "mochi")
PICTURED = ("tiny-wan2.1-i2v", "tiny-animate", "tiny-skyreels-i2v")
"""Models whose cross-attention has keys of a picture too."""
LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "vace_blocks")


@cache
def loaded(name):
    return models.load(name, weights="random", device="cpu")


@cache
def ask(name):
    """Arguments of a short generation; two steps, as LTX-Video has no schedule of one."""
    model, case = loaded(name), heldout.example_case()
    given = heldout.inputs(model.conditions, model.spec.defaults.frames)
    return given | {"prompt": case.caption, "steps": 2}


@cache
def mapped(name):
    return diagnose.attention_map(loaded(name), **ask(name), queries=10**6, at_steps=(0,), progress=False)


@cache
def timed(name):
    return diagnose.attention_times(loaded(name), **ask(name), warmup=False)


def kernel_calls(model, request):
    """Query, key, value, mask and output of PyTorch's kernel, by path of the attention module: `{path: [call, ...]}`."""
    whole, inside, heard, handles = functional.scaled_dot_product_attention, [], defaultdict(list), []
    network = model.component(next(name for name in model.components if name.startswith("expert")))
    for path, module in network.named_modules():
        if path.startswith(LISTS) and hasattr(module, "to_q"):
            handles += [
                module.register_forward_pre_hook(lambda *_, path=path: inside.append(path)),
                module.register_forward_hook(
                    lambda *_: inside.clear()
                ),  # which returns None: the output stays
            ]

    def listening(query, key, value, attn_mask=None, **options):
        made = whole(query, key, value, attn_mask=attn_mask, **options)
        if inside:
            heard[inside[-1]].append((query, key, value, attn_mask, made))
        return made

    functional.scaled_dot_product_attention = listening
    try:
        model.generate(**request, output="latent")
    finally:
        functional.scaled_dot_product_attention = whole
        for handle in handles:
            handle.remove()
    return heard


def attention(query, key, mask):
    """Softmax of all products, `[B, heads, queries, keys]`, in float32."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query.float(), key.float()) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_map_of_all_layers_heads_and_branches(name):
    found, (layers, branches, text) = mapped(name), FAMILIES[name]
    table, facts = found.frame, found.facts
    assert facts["layers"] == layers == sum(facts["blocks"].values())
    assert facts["heads"] == 2
    assert set(table["branch"]) == set(branches)
    kinds = {"self", "cross"} | ({"image"} if name in PICTURED else set())
    assert set(table["kind"]) == kinds
    counted = table.groupby(["branch", "kind", "layer"])["head"].apply(sorted)
    # Mochi's empty negative prompt has no text at all.
    absent = layers if name == "tiny-mochi" else 0
    assert len(counted) == len(branches) * len(kinds) * layers - absent
    assert all(heads == [0, 1] for heads in counted)
    own, cross = found.of("self"), found.of("cross")
    assert (own["own_frame_percent"] + own["other_frames_percent"]).to_numpy() == pytest.approx(100, abs=1e-3)
    assert (cross["prompt_percent"] + cross["padding_percent"]).to_numpy() == pytest.approx(100, abs=1e-3)
    assert ("text_percent" in table) == (text is not None)
    assert ("joint" in facts["attention"][0]) == (text is not None)
    if text:
        assert text in facts["attention"][0]
        assert own["text_percent"].between(0, 100).all()
    # The smallest number of tokens that a prompt of these words can have.
    assert 3 <= facts["prompt_tokens"]["cond"] <= facts["text_keys"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generation_under_recording_is_the_same_bit_for_bit(name):
    model, request = loaded(name), ask(name)
    before = functional.scaled_dot_product_attention
    plain = model.generate(**request, output="latent").video
    layers, seen = FAMILIES[name][0], []

    def look(call, run, query=None, key=None):
        if call.kind == "self":
            seen.append((call.step, call.layer))
            call.kept(*key.shape[:2])
        return run()

    with calls.attention_calls(model, look):
        heard = model.generate(**request, output="latent").video
        with pytest.raises(WanlabError, match="already being recorded"):
            diagnose.attention_map(model, **request, progress=False)
    assert np.array_equal(plain, heard)
    times = 2 if "mochi" in name or (FAMILIES[name][1] == BOTH and not any(b in name for b in BATCHED)) else 1
    assert sorted(seen) == sorted([(s, n) for s in range(2) for n in range(layers)] * times)
    assert functional.scaled_dot_product_attention is before
    experts = [network for part, network in model.components.items() if part.startswith("expert")]
    assert not any(m._forward_hooks or m._forward_pre_hooks for e in experts for m in e.modules())


def branches_of(name, number, calls_of_step, batch):
    """Branch of each element of the batch of a call: the cases that the pipelines of diffusers have."""
    if batch == 2:
        return ("uncond", "cond")
    if "mochi" in name:
        return (("uncond", "cond")[number],)
    return (BOTH[number * 2 // calls_of_step],) if len(FAMILIES[name][1]) == 2 else ONE


@pytest.mark.parametrize(
    "name",
    [
        "tiny-wan2.1-i2v",
        "tiny-vace",
        "tiny-animate",
        "tiny-ltx-i2v",
        "tiny-cogvideox-i2v",
        "tiny-cogvideox1.5-i2v",
        "tiny-hunyuan-t2v",
        "tiny-hunyuan-i2v",
        "tiny-mochi",
    ],
)
def test_all_queries_equal_a_plain_softmax_over_what_the_kernel_gets(name):
    found, text = mapped(name), FAMILIES[name][2]
    frames, height, width = found.facts["grid"]
    video, frame = frames * height * width, np.repeat(np.arange(frames), height * width)
    heard, compared = kernel_calls(loaded(name), ask(name)), 0
    order = sorted(
        {path.rsplit(".", 1)[0] for path in heard}, key=lambda p: (LISTS.index(p.split(".")[0]), p)
    )
    for path, made in heard.items():
        first = made[: len(made) // 2]  # of two steps
        layer = order.index(path.rsplit(".", 1)[0])
        for number, (query, key, value, mask, output) in enumerate(first):
            p = attention(query, key, mask)
            assert torch.allclose(torch.einsum("bhqk,bhkd->bhqd", p, value), output, atol=1e-4)
            for element, branch in enumerate(branches_of(name, number, len(first), len(query))):
                rows = found.frame[(found.frame["layer"] == layer) & (found.frame["branch"] == branch)]
                whole = p[element].double().numpy()
                if text == "first":
                    whole = np.concatenate([whole[..., -video:], whole[..., :-video]], -1)[:, -video:]
                whole = whole[:, :video]
                if "attn2" in path:
                    kind = "image" if name in PICTURED and number % 2 == 0 else "cross"
                    compare(rows[rows["kind"] == kind], whole[..., (whole > 0).any((0, 1))])
                    compared += 1
                    continue
                on_video, on_text = whole[..., :video], whole[..., video:]
                own = rows[rows["kind"] == "self"]
                if text:
                    mass = 100 * on_text.sum(-1).mean(-1)
                    assert own["text_percent"].to_numpy() == pytest.approx(mass, rel=1e-3, abs=1e-3)
                on_video = on_video / on_video.sum(-1, keepdims=True)
                same = 100 * (on_video * (frame[:, None] == frame)).sum(-1).mean(-1)
                assert own["own_frame_percent"].to_numpy() == pytest.approx(same, rel=1e-3, abs=1e-3)
                compare(own, on_video)
                shown = (on_text > 0).any((0, 1)) if on_text.size else np.zeros(0, bool)
                if shown.any():
                    on_text = on_text[..., shown]
                    compare(rows[rows["kind"] == "cross"], on_text / on_text.sum(-1, keepdims=True))
                compared += 1
    of_video = found.frame["kind"] == "self" if text else found.frame["kind"].notna()
    assert compared == of_video.sum() / 2


def compare(rows, p):
    """Entropy and density of a table's heads with those of attention `[heads, queries, keys]`."""
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean(-1)
    assert rows["entropy_nats"].to_numpy() == pytest.approx(entropy, rel=1e-3)
    held = np.cumsum(-np.sort(-p, axis=-1), -1)
    needed = (np.argmax(held >= 0.9 - 1e-6, axis=-1) + 1).mean(-1) / p.shape[-1]
    # A key more or less where the float32 sums end beside the level.
    assert rows["density90_percent"].to_numpy() == pytest.approx(100 * needed, rel=5e-3, abs=0.5)


def test_text_is_told_from_padding_by_the_mask_by_zeros_or_by_the_tokenizer():
    prompt = heldout.example_case().caption
    for name in ("tiny-wan2.2-i2v", "tiny-ltx-t2v", "tiny-cogvideox-t2v", "tiny-mochi"):
        tokens = len(loaded(name).pipeline.tokenizer(prompt)["input_ids"])
        assert mapped(name).facts["prompt_tokens"]["cond"] == tokens, name
    # What a mask leaves out is no key; what is not masked gets its share.
    masked, unmasked = mapped("tiny-ltx-t2v"), mapped("tiny-cogvideox-t2v")
    assert masked.facts["text_keys"] == masked.facts["prompt_tokens"]["cond"]
    assert unmasked.facts["text_keys"] == 226
    assert masked.of("cross")["prompt_percent"].min() == pytest.approx(100)
    assert unmasked.of("cross")["prompt_percent"].max() < 50


def test_frames_that_a_model_adds_are_in_the_grid_and_are_said():
    assert mapped("tiny-animate").facts["grid"] == [4, 4, 4]
    assert any(
        "4 latent frames and the video has 3" in note for note in mapped("tiny-animate").facts["notes"]
    )
    assert any("face_adapter" in note for note in mapped("tiny-animate").facts["notes"])
    # Three latent frames, of which two make a token.
    assert mapped("tiny-cogvideox1.5-i2v").facts["grid"] == [2, 4, 4]
    assert not any("latent frames" in note for note in mapped("tiny-cogvideox1.5-i2v").facts["notes"])
    assert mapped("tiny-hunyuan-t2v").facts["blocks"] == {
        "transformer_blocks": 2,
        "single_transformer_blocks": 2,
    }
    assert mapped("tiny-vace").facts["blocks"] == {"blocks": 2, "vace_blocks": 1}


def test_only_the_wanted_branch_of_a_batch_is_looked_at():
    for name in ("tiny-ltx-t2v", "tiny-mochi"):
        found = diagnose.attention_map(
            loaded(name), **ask(name), branches=("cond",), layers=(1,), at_steps=(0,), progress=False
        )
        assert set(found.frame["branch"]) == {"cond"}
        assert set(found.frame["layer"]) == {1}
        assert set(found.facts["prompt_tokens"]) == {"cond"}


@pytest.mark.parametrize("name", ["tiny-ltx-t2v", "tiny-cogvideox-t2v", "tiny-hunyuan-t2v", "tiny-mochi"])
def test_no_time_is_counted_twice(name):
    times, (layers, branches, text) = timed(name), FAMILIES[name]
    branch = "cond" if branches == ONE else "both"
    assert set(times["branch"]) == {branch}
    assert (times["kind"] == "forward").sum() == 2
    assert ("joint" in times) == (text is not None)
    assert set(times["kind"]) == {"self", "forward"} | (set() if text else {"cross"})
    kernels = 2 if name == "tiny-mochi" else 1  # one of each branch
    assert (times["kind"] == "self").sum() == 2 * layers * kernels
    by_layer = diagnose.layer_times(times)
    assert by_layer["calls"].unique().tolist() == [2]
    own = times[times["kind"] == "self"].groupby(["layer", "step"])["time_ms"].sum()
    medians = by_layer[by_layer["kind"] == "self"].set_index("layer")["median_ms"]
    assert medians.to_numpy() == pytest.approx(own.groupby("layer").median().to_numpy())
    took = mapped(name).with_times(times).times_ms["expert"]
    assert took["forwards"] == 2
    assert took["self_ms"] + took.get("cross_ms", 0) < took["forward_ms"]
    title = plots.layer_time_lines(by_layer).layout.annotations[0].text
    assert title == ("joint attention of video and text" if text else "self-attention")


def test_the_bound_of_joint_attention_leaves_all_pairs_with_text():
    found = mapped("tiny-cogvideox-t2v")
    share = (48 / (48 + 226)) ** 2
    assert found.skippable_pairs == pytest.approx(share)
    bound = diagnose.skippable(found, timed("tiny-cogvideox-t2v"))
    dense = bound.table["density_percent"].mean() / 100
    own = bound.attention_share_percent / 100
    assert bound.bound_ratio == pytest.approx(1 / (1 - own * share * (1 - dense)))
    assert mapped("tiny-ltx-t2v").skippable_pairs == 1


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    keys=st.integers(2, 9),
    form=st.sampled_from(["bool", "-10000", "least", "flat"]),
    whole=st.booleans(),
)
def test_a_mask_that_is_the_same_for_all_queries_says_which_keys_are_kept(seed, batch, keys, form, whole):
    draw = np.random.default_rng(seed)
    kept = torch.from_numpy(draw.random((batch, keys)) < 0.6)
    kept[:, draw.integers(keys)] = True
    low = {"-10000": -10000.0, "least": torch.finfo(torch.float32).min}.get(form, -5e4)
    mask = kept if form == "bool" else torch.where(kept, 0.0, low) + (7.0 if form == "flat" else 0.0)
    mask = mask[:, None, None].expand(batch, 2, 4, keys) if whole else mask[:, None, None]
    call = calls.AttentionCall("expert", 0, "both", 0, "cross", mask=mask, path="expert.blocks.0.attn2")
    found = call.kept(batch, keys)
    assert torch.equal(found, kept)
    # Attention with the mask is attention without the other keys.
    q, k = torch.randn(2, batch, 2, 4, 8, generator=torch.Generator().manual_seed(seed))
    k = k[:, :, :1].expand(-1, -1, keys, -1) * torch.arange(keys)[:, None]
    p = attention(q, k, mask)
    for n in range(batch):
        assert torch.allclose(
            p[n][..., found[n]], attention(q[n : n + 1], k[n : n + 1, :, found[n]], None)[0]
        )
    other = mask.expand(batch, 2, 4, keys).clone()
    other[:, :, 1] = ~other[:, :, 1] if form == "bool" else other[:, :, 1].flip(-1) - torch.arange(keys)
    for refused in (
        calls.AttentionCall("expert", 0, "both", 0, "cross", mask=other, path="blocks.0.attn2"),
        calls.AttentionCall("expert", 0, "both", 0, "cross", causal=True, path="blocks.0.attn2"),
        calls.AttentionCall(
            "expert", 0, "both", 0, "cross", mask=-torch.arange(4.0)[None, None, None], path="b"
        ),
    ):
        with pytest.raises(WanlabError, match="masked differently for each query, or by degrees"):
            refused.kept(batch, refused.mask.shape[-1] if refused.mask is not None else keys)


def test_a_family_that_is_not_known_is_seen_as_far_as_it_can_be(monkeypatch):
    monkeypatch.setattr(type(loaded("tiny-ltx-t2v")), "family", Family(), raising=True)
    known = mapped("tiny-ltx-t2v")
    found = diagnose.attention_map(
        loaded("tiny-ltx-t2v"), **ask("tiny-ltx-t2v"), queries=10**6, at_steps=(0,), progress=False
    )
    assert found.frame["entropy_nats"].tolist() == known.frame["entropy_nats"].tolist()
    assert any("a family that wanlab does not know" in note for note in found.facts["notes"])
    with pytest.raises(WanlabError, match="where the text stands is not known; state `text_first`"):
        diagnose.attention_map(loaded("tiny-hunyuan-t2v"), **ask("tiny-hunyuan-t2v"), progress=False)


def test_a_dispatch_that_ends_in_pytorch_is_heard_once(monkeypatch):
    """One processor calls PyTorch itself, so that it is listened to as well as diffusers' dispatch."""
    model = loaded("tiny-ltx-t2v")
    attn = model.component("expert").transformer_blocks[1].attn1

    class Itself:
        def __call__(self, attn, hidden_states, *_, **__):
            parts = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
            q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
            return attn.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(attn, "processor", Itself())
    seen = []

    def look(call, run, query=None, key=None):
        if query is not None:
            seen.append((call.step, call.layer, call.kind, query.shape[2:]))
        return run()

    with calls.attention_calls(model, look):
        model.generate(**ask("tiny-ltx-t2v"), output="latent")
    assert seen == [(s, n, k, (2, 16)) for s in range(2) for n in range(2) for k in ("self", "cross")]


def test_attention_that_goes_another_way_is_refused(monkeypatch):
    model = loaded("tiny-cogvideox-t2v")
    attn = model.component("expert").transformer_blocks[1].attn1

    class ByHand:
        def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
            return hidden_states, encoder_hidden_states

    monkeypatch.setattr(attn, "processor", ByHand())
    with pytest.raises(WanlabError, match=r"transformer_blocks\.1\.attn1: ByHand goes neither through"):
        diagnose.attention_map(model, **ask("tiny-cogvideox-t2v"), progress=False)
    assert not attn._forward_hooks


def test_kernels_are_timed_at_the_shape_that_the_map_sees():
    for name in FAMILIES:
        facts, model = mapped(name).facts, loaded(name)
        tokens, heads, dim, latent_frames, text, *_ = backends._resolved(model, None, None, None, 1, "", "")
        assert (heads, dim) == (2, 16), name
        assert latent_frames == facts["grid"][0], name
        assert tokens - text == math.prod(facts["grid"]), name
        assert (text > 0) == (FAMILIES[name][2] is not None), name
    # flex_attention as it is: compiling takes longer than all other tests.
    with torch.compiler.set_stance("force_eager"):
        found = diagnose.attention_kernels(
            loaded("tiny-cogvideox-t2v"), iterations=1, flex=True, progress=False
        )
    assert found.facts["tokens"] == 48 + 226
    assert found.facts["text_tokens"] == 226
    window = found.table.set_index("kernel").loc["flex, window of ±1 frames"]
    assert window["density_percent"] == pytest.approx(100 * (1 - 2 * 16**2 / 274**2))
    assert window["relative_error"] < 1e-5


@settings(max_examples=20)
@given(
    frames=st.integers(1, 5), per_frame=st.integers(1, 90), window=st.integers(0, 3), text=st.integers(0, 300)
)
def test_a_window_leaves_the_text_in(frames, per_frame, window, text):
    from torch.nn.attention.flex_attention import create_mask

    video = frames * per_frame
    tokens = video + text
    mask = backends.window_mask(tokens, frames, window, text_tokens=text)
    token = torch.arange(tokens)
    near = (token[:, None] // per_frame - token // per_frame).abs() <= window
    near |= (token >= video) | (token >= video)[:, None]
    assert torch.equal(create_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")[0, 0], near)
    blocks = -(-tokens // backends.BLOCK)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:tokens, :tokens] = near
    tiles = padded.view(blocks, 128, blocks, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    assert int(mask.full_kv_num_blocks.sum()) == int(tiles.all(3).all(1).sum())
    assert backends.pair_share(frames, window, text / tokens) == pytest.approx(float(near.double().mean()))


def test_the_figure_of_text_shows_what_there_is():
    shown = {
        "tiny-wan2.2-i2v": "words of the prompt",
        "tiny-ltx-t2v": "entropy",
        "tiny-cogvideox-t2v": "mass on the text",
        "tiny-hunyuan-t2v": "mass on the text",
    }
    for name, words in shown.items():
        assert words in plots.text_map(mapped(name)).layout.title.text, name
    rows = mapped("tiny-hunyuan-t2v").of("self").query("head == 1 and layer == 3")
    figure = plots.text_map(mapped("tiny-hunyuan-t2v"))
    assert figure.data[0].z[1][3] == pytest.approx(rows["text_percent"].iloc[0])


def test_a_map_of_joint_attention_is_kept_and_read_again(tmp_path):
    found = mapped("tiny-mochi").with_times(timed("tiny-mochi"))
    read = diagnose.AttentionMap.load(found.save(tmp_path / "map.csv.gz"))
    assert read.facts == found.facts
    assert read.row() == pytest.approx(found.row(), rel=1e-4)
    assert read.row()["text_median_percent"] > 0
    table = read.summary().set_index("statistic")
    assert list(table.columns) == ["expert cond", "expert uncond", "uniform", "se"]
    assert table.loc["text_percent", "expert uncond"] == 0
    keys = read.facts["text_keys"]
    assert table.loc["text_percent", "uniform"] == pytest.approx(100 * keys / (keys + 32))
