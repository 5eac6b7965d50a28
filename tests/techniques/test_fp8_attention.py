"""Attention in 8 bits: its arithmetic, its rules, and faults that the proof has to see."""

from __future__ import annotations

import pytest
import torch

from wanlab import configuration, techniques
from wanlab.core.errors import WanlabError
from wanlab.precision.plan import Rule
from wanlab.techniques.attention import fp8
from wanlab.techniques.attention.errors import attention_error
from wanlab.techniques.attention.kernels import KERNELS
from wanlab.techniques.fp8_attention import attention_errors, wanted


def drawn(tokens=300, heads=2, size=32, batch=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, size, generator=draw) for _ in range(3)]


@pytest.mark.parametrize("size", [16, 48, 128])
@pytest.mark.parametrize("rotate", [False, True])
def test_codes_stand_for_what_they_were_made_of(size, rotate):
    query, key, value = drawn(size=size, batch=2)
    value += 5.0
    codes = fp8.coded(query, key, value, rotate)
    assert {each.dtype for each in codes[:3]} == {torch.float8_e4m3fn}
    assert [tuple(scale.shape) for scale in codes.scales] == [(2, 2)] * 3
    back = [
        each.float() * scale[:, None, :, None] for each, scale in zip(codes[:3], codes.scales, strict=True)
    ]
    exact_key = key - key.mean(1, keepdim=True)
    expected = (fp8.rotated(query), fp8.rotated(exact_key)) if rotate else (query, exact_key)
    for got, want in zip(back, (*expected, value - value.mean(1, keepdim=True)), strict=True):
        assert 0 < float((got - want).norm() / want.norm()) < 0.04
    assert torch.allclose(codes.value_mean, value.mean(1, keepdim=True), atol=1e-5)
    assert float(codes.value.float().abs().max()) == fp8.LARGEST


@pytest.mark.parametrize("size", [16, 48, 128])
def test_a_rotation_leaves_products_as_they_are(size):
    query, key, _ = drawn(size=size)
    products = (fp8.rotated(query) * fp8.rotated(key)).sum(-1)
    assert torch.allclose(products, (query * key).sum(-1), atol=1e-4)
    matrix = fp8.hadamard(size, torch.device("cpu"), torch.float32)
    assert torch.equal(matrix @ matrix.t(), len(matrix) * torch.eye(len(matrix)))
    assert len(matrix) == {16: 16, 48: 16, 128: 128}[size]


def test_it_is_attention_with_an_error_of_8_bits():
    query, key, value = drawn(batch=2)
    error = attention_error(lambda *qkv: fp8.fp8_attention(*qkv, "simulated"), query, key, value)
    assert 1e-3 < error < 0.08
    # All at once and a few queries at a time are the same.
    codes = fp8.coded(query, key, value)
    whole = fp8.simulated(codes)
    before, fp8.SCORES = fp8.SCORES, 7 * 2 * 2 * 300
    try:
        assert torch.allclose(fp8.simulated(codes), whole, atol=1e-6)
    finally:
        fp8.SCORES = before


def test_taking_off_the_mean_of_the_values_matters_where_there_is_one():
    query, key, value = drawn(tokens=2000)
    value += 3.0
    errors = fp8.fp8_errors(query, key, value).set_index("variant")["error"]
    assert list(errors.index) == ["bf16", *fp8.VARIANTS]
    assert errors["bf16"] < 0.004
    assert errors["fp8"] < 0.8 * errors["fp8, V's mean left"]


def test_a_rotation_helps_where_a_few_channels_are_large():
    query, key, value = drawn(tokens=600, size=128)
    for each in (query, key):
        each[..., 3] *= 25
    errors = fp8.fp8_errors(query, key, value).set_index("variant")["error"]
    assert errors["fp8, rotated"] < errors["fp8"]


def test_the_last_rule_that_fits_says():
    rules = (
        Rule(format="fp8", component="expert_low"),
        Rule(format="default", blocks="first 2, 9"),
        Rule(format="default", steps="0-1"),
        Rule(format="fp8", component="expert_high", blocks="5", steps="1"),
    )
    assert not wanted(rules, "expert_high", 5, 10, 0)
    assert wanted(rules, "expert_high", 5, 10, 1)
    assert wanted(rules, "expert_low", 5, 10, 2)
    assert not wanted(rules, "expert_low", 1, 10, 2)
    assert not wanted(rules, "expert_low", 9, 10, 2)
    assert not wanted(rules, "expert_low", 5, 10, 1)
    assert wanted((), "expert", 0, 1, 0)


def test_a_generation_in_8_bits_says_that_it_is_simulated_and_how_exact_it_is(bench):
    switched, video = bench.switched_on(["fp8_attention"])
    assert 1e-4 < bench.far(video) < 0.3
    proof = switched.proofs()["fp8_attention"]
    assert proof.passed
    assert (
        "simulated in PyTorch, so that nothing is faster: this machine has no FP8 attention" in proof.sentence
    )
    assert "24 of 24 of the high-noise expert, error 0.0" in proof.sentence
    assert "24 of 24 of the low-noise expert, error 0.0" in proof.sentence
    rotated, _ = bench.switched_on({"fp8_attention": {"rotate": True}})
    assert rotated.proofs()["fp8_attention"].passed


def test_rules_choose_experts_blocks_and_steps(bench, tmp_path):
    text = """
name: mine
techniques:
  attention_kernel: {kernel: sdpa-flash}
  fp8_attention:
    rules:
      - {format: fp8, component: expert_low, blocks: 2-4}
      - {format: default, steps: 0-2}
"""
    chosen = configuration.parse_configuration(text)
    assert configuration.parse_configuration(chosen.to_yaml()) == chosen
    size = {"height": 64, "width": 96, "frames": 5}
    used = configuration.configure(bench.model, chosen, tmp_path, **size, steps=4, progress=False)
    assert used.effect == "applied"
    # The low-noise expert has steps 2 and 3; step 3 has two branches, each with three such blocks.
    assert "6 of 24 of the low-noise expert, error" in used.proof
    assert "0 of 24 of the high-noise expert" in used.proof
    assert "18 of 24 of the low-noise expert (sdpa-flash 18)" in used.proof


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{format: int8}]", "rule 1 has format 'int8'; give fp8 or default"),
        ("[{format: fp8, layers: [attn1.to_q]}]", "rule 1 names layers; self-attention is the only one here"),
        ("[{format: fp8, blocks: frist 3}]", "is no choice of blocks"),
        ("[{format: fp8, block: 3}]", "Object contains unknown field `block`"),
    ],
)
def test_a_mistake_in_a_rule_is_one_line(rules, message):
    with pytest.raises(WanlabError, match=r"mine\.yaml, line ") as error:
        configuration.parse_configuration(
            f"name: mine\ntechniques:\n  fp8_attention:\n    rules: {rules}\n", "mine.yaml"
        )
    assert message in str(error.value)


def test_errors_on_a_models_own_activations_are_a_table(bench):
    request = {
        "image": bench.image,
        "prompt": bench.prompt,
        "height": 64,
        "width": 96,
        "frames": 5,
        "steps": 2,
    }
    frame = attention_errors(
        bench.model, request | {"output": "latent"}, blocks="first 1, last 1", variants=["fp8"]
    )
    assert list(frame.columns) == ["component", "block", "step", "variant", "kernel", "error", "times_bf16"]
    assert len(frame) == 2 * 2 * 2 * 2  # steps, branches, blocks, and bf16 beside fp8
    assert set(frame["block"]) == {0, len(bench.model.component("expert_high").blocks) - 1}
    assert (frame.loc[frame["variant"] == "bf16", "error"] < 0.01).all()
    assert (frame.loc[frame["variant"] == "fp8", "times_bf16"] > 1).all()


def test_a_gpu_that_has_the_kernel_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    device = torch.device("cuda")
    assert fp8.lacks_kernel(device, 128) == "the package of flash-attention-3: pip install fa3-fwd"
    assert fp8.kernel_here(device, 128) == "simulated"
    monkeypatch.setattr("wanlab.techniques.attention.kernels.importable", lambda module: True)
    assert fp8.kernel_here(device, 128) == "flash-attention-3"
    assert fp8.kernel_here(torch.device("cpu"), 128) == "simulated"


def test_a_simulation_is_said_before_it_runs(capsys):
    from wanlab.cli.main import main

    chosen = configuration.parse_configuration("name: mine\ntechniques: [fp8_attention, sparse_attention]\n")
    explained = configuration.explain(chosen, "wan-nano", device="cpu")
    assert [line.partition(" to save time: an NVIDIA GPU")[0] for line in explained.missing] == [
        "for fp8_attention",
        "for sparse_attention",
    ]
    assert main(["techniques", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "it can run here, simulated: the same quality and no time saved; that needs an NVIDIA GPU" in out


def test_the_kernel_that_was_asked_for_by_name_is_needed(bench):
    with pytest.raises(
        WanlabError, match=r"fp8_attention cannot run here: it needs an NVIDIA GPU \(compute capability 9.0"
    ):
        techniques.switch_on(bench.model, {"fp8_attention": {"kernel": "flash-attention-3"}})


def test_the_kernel_is_called_as_its_package_wants(monkeypatch):
    import sys
    from types import ModuleType

    given = {}

    def flash_attn_func(query, key, value, softmax_scale=None, causal=False, qv=None, **named):
        given.update(named, shape=tuple(query.shape), dtypes={query.dtype, key.dtype, value.dtype})
        scales = (named["q_descale"], named["k_descale"], named["v_descale"])
        codes = fp8.Coded(query, key, value, scales, torch.zeros(1))
        return fp8.simulated(codes).to(torch.bfloat16)

    module = ModuleType("fa3_fwd_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    query, key, value = drawn(batch=2)
    error = attention_error(lambda *qkv: fp8.fp8_attention(*qkv, "flash-attention-3"), query, key, value + 3)
    assert error < 0.08
    assert given["dtypes"] == {torch.float8_e4m3fn}
    assert given["shape"] == (2, 300, 2, 32)
    assert {tuple(given[name].shape) for name in ("q_descale", "k_descale", "v_descale")} == {(2, 2)}


# Planted faults.


def test_an_attention_that_fell_back_to_the_dtype_of_the_model_is_seen(bench, monkeypatch):
    def fallen(query, key, value, kernel, rotate, told):
        told(kernel, query.dtype)
        return KERNELS["sdpa-flash"].run(query, key, value)

    monkeypatch.setattr(fp8, "fp8_attention", fallen)
    switched, _ = bench.switched_on(["fp8_attention"])
    proof = switched.proofs()["fp8_attention"]
    assert (proof.passed, proof.sentence) == (
        False,
        "fp8_attention fell back: 24 of 24 attentions of the high-noise expert multiplied no 8-bit codes.",
    )


def test_an_attention_that_only_says_that_it_was_in_8_bits_is_seen(bench, monkeypatch):
    def lying(query, key, value, kernel, rotate, told):
        told(kernel, fp8.CODES)
        return KERNELS["sdpa-flash"].run(query, key, value)

    monkeypatch.setattr(fp8, "fp8_attention", lying)
    switched, _ = bench.switched_on(["fp8_attention"])
    proof = switched.proofs()["fp8_attention"]
    assert not proof.passed
    assert "is bit for bit that of the model's dtype" in proof.sentence


def test_8_bits_on_one_expert_only_are_seen(bench):
    switched = techniques.switch_on(bench.model, ["fp8_attention"])
    for site in switched.techniques[0].sites["expert_low"]:
        site.layers.clear()
    bench.generate(switched.model)
    proof = switched.proofs()["fp8_attention"]
    assert not proof.passed
    assert proof.sentence == (
        "fp8_attention left out 24 attentions of the low-noise expert that its rules name."
    )


def test_rules_that_fit_nothing_are_seen(bench):
    rules = [{"format": "fp8", "blocks": "90"}]
    switched, video = bench.switched_on({"fp8_attention": {"rules": rules}})
    assert (video == bench.video).all()
    proof = switched.proofs()["fp8_attention"]
    assert (proof.passed, proof.sentence) == (
        False,
        "fp8_attention computed no attention: no rule fits a block and a step that ran.",
    )
