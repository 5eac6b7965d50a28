"""Judging a video by its caption: the truth is judged right at every size, and what moves otherwise is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab.heldout import cases as heldout
from wanlab.heldout import clips, motion
from wanlab.heldout.motion import MOSTLY_VISIBLE

SIZES = [(128, 192, 17), (256, 384, 33)]


@pytest.mark.slow
def test_motion_is_measured_right_on_true_clips():
    read, misread = 0, []
    for case in heldout.draw_cases(18)[9:]:
        video = case.truth()
        read += motion.follows_caption(video, case.clip)
        if case.clip.motion != "still":
            # Played backwards every moving clip shows another motion, and the frozen frame shows none.
            misread += [case.caption] if motion.follows_caption(video[::-1], case.clip) else []
            frozen = np.repeat(video[:1], len(video), axis=0)
            misread += [] if motion.camera_motion(frozen)[0] == "still" else [case.caption]
    assert not misread
    assert read == 9


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "frames"), [(128, 192, 17), (192, 288, 25), (256, 384, 33)])
def test_the_camera_is_read_at_every_size_behind_three_shapes(height, width, frames):
    cases = heldout.draw_cases(9, seed=3, height=height, width=width, objects=(3,), textures=0.5)
    for case in cases:
        video = case.truth()
        assert len(video) == frames
        assert motion.follows_caption(video, case.clip), case
        frozen = np.repeat(video[:1], frames, axis=0)
        assert motion.camera_motion(frozen, height)[0] == "still"
        assert not any(motion.objects_follow(frozen, case.clip))


def test_shapes_before_a_flat_sky_are_not_taken_for_the_camera():
    shapes = (
        clips.MovingObject("square", "red", "down", 140.0, 19.0),
        clips.MovingObject("square", "green", "right", 74.0, 96.0),
        clips.MovingObject("circle", "blue", "left", 145.0, 96.0),
    )
    clip = clips.Clip("pan_right", 139.95, 123.52, 0.97, shapes)
    assert motion.camera_follows(heldout.render_clip("rocket.jpg", clip), clip)


@pytest.mark.parametrize("size", SIZES)
def test_every_shape_of_true_clips_is_found_though_others_hide_it(size):
    height, width, _ = size
    hidden, opposite = 0, {"left": "right", "right": "left", "up": "down", "down": "up"}
    for case in heldout.draw_cases(8, seed=6, height=height, width=width, objects=(3,), textures=0.5):
        video, clip = case.truth(), case.clip
        assert motion.objects_follow(video, clip) == [True] * 3
        hidden += bool((motion.visible_shares(clip, len(video))[:, -1] < MOSTLY_VISIBLE).any())
        for i, moving in enumerate(clip.objects):
            wrong = dataclasses.replace(moving, direction=opposite[moving.direction])
            others = (*clip.objects[:i], wrong, *clip.objects[i + 1 :])
            assert not motion.objects_follow(video, dataclasses.replace(clip, objects=others))[i]
    assert hidden >= 1


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from(SIZES))
def test_every_shape_moves_on_before_it_is_hidden_for_good(seed, size):
    height, width, frames = size
    clip = clips.draw_clip(
        (700, 700), np.random.default_rng(seed), objects=3, height=height, width=width, frames=frames
    )
    shares = motion.visible_shares(clip, frames)
    assert (shares[:, 0] == 1).all()
    assert (shares[0] == 1).all()  # the shape in front is never hidden
    for visible in shares:
        # A quarter of its way is enough to tell where it goes.
        assert np.flatnonzero(visible >= MOSTLY_VISIBLE)[-1] >= (frames - 1) / 4


def test_the_visible_share_is_that_of_the_picture():
    front = clips.MovingObject("circle", "red", "right", 30.0, 60.0)
    back = clips.MovingObject("square", "blue", "left", 94.0, 60.0)
    clip = clips.Clip("still", 200.0, 150.0, 1.0, (front, back))
    shares = motion.visible_shares(clip, 9)
    video = heldout.render_clip("coffee.png", clip, 9)
    blue = (np.abs(video - np.array(clips.COLOUR_RGB["blue"])) < 0.02).all(axis=-1).sum(axis=(1, 2))
    np.testing.assert_allclose(shares[1], blue / blue[0], atol=0.03)
    assert shares[1, 8] < 0.2
