"""The arithmetic from pixels and frames to latents and tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab.core.errors import WanlabError
from wanlab.models import LatentShape, get, latent_shape, nearest_size

A14B, TI2V = get("wan2.2-i2v-a14b"), get("wan2.2-ti2v-5b")
SPECS = st.sampled_from([A14B, TI2V])


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (A14B, (480, 832, 81), LatentShape(16, 21, 60, 104, 32_760)),
        (A14B, (480, 848, 81), LatentShape(16, 21, 60, 106, 33_390)),
        (A14B, (720, 1280, 81), LatentShape(16, 21, 90, 160, 75_600)),
        (A14B, (1088, 1920, 81), LatentShape(16, 21, 136, 240, 171_360)),
        (A14B, (480, 832, 1), LatentShape(16, 1, 60, 104, 1_560)),
        (TI2V, (704, 1280, 121), LatentShape(48, 31, 44, 80, 27_280)),
        (TI2V, (480, 832, 121), LatentShape(48, 31, 30, 52, 12_090)),
    ],
)
def test_legal_sizes(spec, size, expected):
    assert latent_shape(spec, *size) == expected


@pytest.mark.parametrize(
    ("spec", "size", "nearest"),
    [
        (A14B, (480, 854, 81), "480x848"),
        (A14B, (480, 830, 81), "480x832"),
        (A14B, (1080, 1920, 81), "1072x1920 or 1088x1920"),
        (A14B, (1081, 1920, 81), "1088x1920"),
        (TI2V, (720, 1280, 121), "704x1280 or 736x1280"),
        (TI2V, (480, 854, 121), "480x864"),
        (A14B, (3, 5, 81), "16x16"),
        (A14B, (480, 832, 80), "81"),
        (A14B, (480, 832, 79), "77 or 81"),
        (A14B, (480, 832, 2), "1"),
    ],
)
def test_illegal_sizes_name_the_nearest(spec, size, nearest):
    with pytest.raises(WanlabError, match=f"the nearest is {nearest}$"):
        latent_shape(spec, *size)


def test_both_faults_are_named_in_one_line():
    with pytest.raises(WanlabError) as caught:
        latent_shape(A14B, 481, 832, 82)
    assert "480x832" in str(caught.value)
    assert "the nearest is 81" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size", [(0, 832, 81), (-16, 832, 81), (480.0, 832, 81), (480, True, 81), (480, 832, 0)]
)
def test_no_number_no_shape(size):
    with pytest.raises(WanlabError, match="must be a whole number"):
        latent_shape(A14B, *size)


def test_a_video_beyond_the_position_embedding_is_refused():
    with pytest.raises(WanlabError, match="1025 positions"):
        latent_shape(A14B, 16 * 1025, 832, 81)


@given(SPECS, st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 500))
def test_nearest_size_is_legal_and_nearest(spec, height, width, frames):
    near = nearest_size(spec, height, width, frames)
    shape = latent_shape(spec, *near)
    factor, step = spec.temporal_factor, spec.spatial_factor * spec.patch[1]
    assert (shape.frames - 1) * factor + 1 == near[2]
    assert (shape.height * spec.spatial_factor, shape.width * spec.spatial_factor) == near[:2]
    for value, found, legal in (
        (height, near[0], range(step, 5100, step)),
        (width, near[1], range(step, 5100, step)),
        (frames, near[2], range(1, 600, factor)),
    ):
        assert abs(found - value) == min(abs(other - value) for other in legal)


@given(SPECS, st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 200))
def test_refused_exactly_when_not_legal(spec, height, width, frames):
    step = spec.spatial_factor * spec.patch[1]
    legal = height % step == 0 and width % step == 0 and frames % spec.temporal_factor == 1
    if legal:
        shape = latent_shape(spec, height, width, frames)
        assert shape.tokens == shape.frames * (shape.height // 2) * (shape.width // 2)
    else:
        with pytest.raises(WanlabError, match=r"\A[^\n]+\Z"):
            latent_shape(spec, height, width, frames)
