"""Number formats: rounding, saturation, scales, and agreement with ONNX's own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wanlab.core.errors import WanlabError
from wanlab.precision.formats import BLOCK_SIZES, FORMATS, decode_weight, encode_weight, get_format
from wanlab.precision.quant_linear import fake_quantize

INT8, FP8 = FORMATS["int8"].activation, FORMATS["fp8"].activation
INT4 = FORMATS["int4-weight"].weight
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

values = hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-1e4, 1e4, width=32))
scales = st.floats(2**-10, 2**6, width=32)


@pytest.mark.parametrize("numbers", [INT8, INT4], ids=lambda n: n.kind)
@given(values, scales)
def test_integers_round_to_half_a_step_and_saturate_outside(numbers, x, scale):
    x, scale = torch.from_numpy(x), torch.tensor(scale)
    rounded = fake_quantize(x, scale, numbers)
    low, high = numbers.smallest * scale, numbers.largest * scale
    inside = (x >= low) & (x <= high)
    assert ((rounded - x).abs()[inside] <= scale / 2 * (1 + 1e-5)).all()
    assert (rounded[x > high] == high).all()
    assert (rounded[x < low] == low).all()
    assert torch.equal(fake_quantize(rounded, scale, numbers), rounded)


@given(values, scales)
def test_fp8_rounds_like_torch_and_saturates(x, scale):
    x, scale = torch.from_numpy(x), torch.tensor(scale)
    rounded = fake_quantize(x, scale, FP8)
    inside = (x / scale).abs() <= 448
    want = (x / scale)[inside].to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(rounded[inside], want)
    # 3 bits of fraction; below 2**-6 the codes are 2**-9 apart
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)
    assert ((rounded - x).abs()[inside] <= bound[inside]).all()
    assert torch.equal(rounded[~inside].abs(), torch.full_like(rounded[~inside], 448) * scale)


@pytest.mark.parametrize("numbers", [INT8, FP8], ids=lambda n: n.kind)
@given(hnp.arrays(np.float32, 32, elements=st.floats(-600, 600, width=32)), st.sampled_from([0.25, 1.0, 3.7]))
def test_codes_are_those_of_onnx(numbers, x, scale):
    """Ties included: halves are drawn often."""
    import onnx.reference

    x = np.concatenate([x, np.round(x * 2) / 2]).astype(np.float32)
    kind = onnx.TensorProto.INT8 if numbers is INT8 else onnx.TensorProto.FLOAT8E4M3FN
    step = np.array(scale, np.float32)
    zero = onnx.helper.make_tensor("zero", kind, [], [0])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])],
        [onnx.numpy_helper.from_array(step, "scale"), zero],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (want,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    got = fake_quantize(torch.from_numpy(x), torch.tensor(scale), numbers)
    np.testing.assert_array_equal(got.numpy(), want)


weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([64, 128])),
    elements=st.floats(-8, 8, width=32),
    fill=st.just(0.0),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "int4-weight-32"])
@given(weights)
def test_weights_lose_half_a_step_at_most(name, dtype, w):
    numbers = get_format(name).weight
    w = torch.from_numpy(w)
    codes, scale = encode_weight(w, numbers, dtype)
    back = decode_weight(codes, scale, numbers, torch.float32)
    assert codes.shape == w.shape
    assert scale.dtype == dtype
    assert (scale.float() > 0).all()
    want_shape = {"tensor": (), "channel": (len(w),), "block": (len(w), w.shape[1] // (numbers.block or 1))}
    assert scale.shape == want_shape[numbers.granularity]
    step = scale.float()
    if numbers.granularity == "block":
        step = step.repeat_interleave(numbers.block, dim=1)
    elif numbers.granularity == "channel":
        step = step[:, None]
    fp8 = torch.maximum(w.abs() * 2**-4, step * 2**-10)
    bound = fp8 if numbers.kind == "fp8" else step / 2
    # A scale rounded down to the dtype puts the largest weight beyond the last code by that rounding.
    bound = bound + w.abs() * (torch.finfo(dtype).eps + 1e-6)
    assert ((back - w).abs() <= bound).all()
    assert torch.equal(back[w == 0], torch.zeros_like(back[w == 0]))


def test_more_scales_lose_less():
    """Channels of very different size: a scale for each keeps the small ones."""
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 16)[:, None]

    def worst(name):
        numbers = get_format(name).weight
        codes, scale = encode_weight(w, numbers, torch.float32)
        back = decode_weight(codes, scale, numbers, torch.float32)
        return float(((back - w).norm(dim=1) / w.norm(dim=1)).max())

    assert worst("fp8-channel") < worst("fp8") * 1.01
    assert worst("int8-weight") < 0.02
    assert worst("int4-weight-32") < worst("int4-weight") < worst("int4-weight-128")


def test_convolutions_take_a_scale_per_output():
    w = torch.randn(4, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_weight(w, FORMATS["int8"].weight, torch.float32)
    back = decode_weight(codes, scale, FORMATS["int8"].weight, torch.float32)
    assert scale.shape == (4,)
    assert ((back - w).abs().flatten(1).amax(dim=1) <= scale / 2 * 1.0001).all()
    with pytest.raises(WanlabError, match="convolution"):
        encode_weight(w, INT4, torch.float32)


def test_blocks_must_fill_the_inputs():
    with pytest.raises(WanlabError, match=r"192 inputs.*128.*use blocks of 32 or 64"):
        encode_weight(torch.zeros(2, 192), get_format("int4-weight-128").weight, torch.float32)
    with pytest.raises(WanlabError, match="leave it out"):
        encode_weight(torch.zeros(2, 24), INT4, torch.float32)


def test_formats_are_found_by_name():
    assert {get_format(f"int4-weight-{size}").weight.block for size in BLOCK_SIZES} == set(BLOCK_SIZES)
    assert [FORMATS[name].bits for name in ("int8", "fp8", "int8-weight", "int4-weight")] == [
        "W8A8",
        "W8A8",
        "W8A16",
        "W4A16",
    ]
    with pytest.raises(WanlabError, match="did you mean 'int8'"):
        get_format("int9")
    with pytest.raises(WanlabError, match="no format"):
        get_format("int4-weight-48")
