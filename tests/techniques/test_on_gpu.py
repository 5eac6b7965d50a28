"""Techniques of attention and of the VAE on a GPU: each kernel that runs there, against float64."""

from __future__ import annotations

import pytest
import torch

from wanlab import models, techniques
from wanlab.techniques.attention import blocks, fp8, sparse
from wanlab.techniques.attention.errors import LIMITS, attention_error, exact_attention, sampled_queries
from wanlab.techniques.attention.kernels import KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
GRID = (9, 22, 40)


def drawn(mean=0.0):
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (1, GRID[0] * GRID[1] * GRID[2], 4, 128)
    query, key, value = (
        torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    return query, key, value + mean


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_is_as_exact_as_its_limit(name):
    kernel, tensors = KERNELS[name], drawn()
    if reason := kernel.lacks(tensors[0].device, torch.bfloat16, 128):
        pytest.skip(f"it needs {reason}")
    key = tensors[1].clone()
    error = attention_error(kernel.run, *tensors)
    assert error <= (0.03 if kernel.rounds else LIMITS["bfloat16"])
    assert torch.equal(tensors[1], key)


@pytest.mark.parametrize("rotate", [False, True])
def test_codes_of_8_bits_are_multiplied_with_little_error(rotate):
    tensors = drawn(mean=1.0)
    if reason := fp8.lacks_kernel(tensors[0].device, 128):
        pytest.skip(f"it needs {reason}")

    def attention(*qkv):
        return fp8.fp8_attention(*qkv, "flash-attention-3", rotate)

    assert 0.0005 < attention_error(attention, *tensors) < 0.02


@pytest.mark.parametrize("name", ["flash-attention-4", "flex"])
@pytest.mark.parametrize("pattern", blocks.PATTERNS)
def test_kept_blocks_are_exact(name, pattern):
    tensors = drawn()
    if reason := sparse.lacks_kernel(name, tensors[0].device, 128, torch.bfloat16, 128):
        pytest.skip(f"it needs {reason}")
    table = blocks.table_of_density(pattern, GRID, 128, 0.5)
    assert table.density < 0.6
    picked = sampled_queries(table.tokens)
    exact = exact_attention(*tensors, picked, table.of_tokens(picked))
    output = sparse.SPARSE[name](*tensors, table)[:, picked.cuda()].double()
    assert float((output - exact).norm() / exact.norm()) <= LIMITS["bfloat16"]


@pytest.mark.parametrize("compiled", [False, True])
def test_wan_nano_generates_with_all_of_them(compiled, bench):
    model = models.load("wan-nano", device="cuda", dtype="bfloat16")
    chosen = {
        "fused_qkv": {},
        "attention_kernel": {},
        "fp8_attention": {"rules": [{"format": "fp8", "blocks": "1-2"}], "kernel": "simulated"},
        "sparse_attention": {
            "pattern": "window",
            "block": 4,
            "density": 0.6,
            "dense_percent": 0,
            "dense_blocks": 4,
        },
        "vae_channels_last": {"compiled": compiled},
    }
    switched = techniques.switch_on(model, chosen)
    bench.generate(switched.model, output="np")
    assert {name: proof.sentence for name, proof in switched.proofs().items() if not proof.passed} == {}
