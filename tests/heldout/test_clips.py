"""Procedural clips: what the caption says is what the camera does, and the measuring of motion can tell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab.heldout import cases as heldout
from wanlab.heldout import clips
from wanlab.heldout.clips import CAMERA_MOTIONS, FRAMES, HEIGHT, WIDTH

MOTIONS = list(CAMERA_MOTIONS)


def test_no_photograph_is_both_trained_on_and_held_out():
    assert not set(clips.TRAINING_PHOTOGRAPHS) & set(clips.HELD_OUT_PHOTOGRAPHS)


@given(
    seed=st.integers(0, 2**32 - 1),
    motion_name=st.sampled_from(MOTIONS),
    size=st.tuples(st.integers(300, 768), st.integers(300, 768)),
)
def test_the_camera_never_leaves_the_photograph(seed, motion_name, size):
    clip = clips.draw_clip(size, np.random.default_rng(seed), motion=motion_name)
    corners = np.array([[x * WIDTH / 2, y * HEIGHT / 2, 1.0] for x in (-1, 1) for y in (-1, 1)])
    reach = np.einsum("tij,cj->tci", clips.camera_path(motion_name), corners) * clip.scale
    reach += [clip.centre_x_px, clip.centre_y_px]
    assert reach.min() >= -1e-6
    assert (reach.reshape(-1, 2).max(axis=0) <= np.array([size[1] - 1, size[0] - 1]) + 1e-6).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_an_object_stays_in_the_picture_and_in_the_caption(seed):
    clip = clips.draw_clip((500, 500), np.random.default_rng(seed), with_object=True)
    moving = clip.moving_object
    for frame in (0, FRAMES - 1):
        x, y = (start + frame * step for start, step in zip(
            (moving.start_x_px, moving.start_y_px), moving.step_px, strict=True))  # fmt: skip
        assert clips.OBJECT_RADIUS_PX <= x <= WIDTH - clips.OBJECT_RADIUS_PX
        assert clips.OBJECT_RADIUS_PX <= y <= HEIGHT - clips.OBJECT_RADIUS_PX
    assert clip.caption.endswith(f"a {moving.colour} {moving.shape} moves {moving.direction}")


def test_a_pan_moves_the_picture_by_whole_pixels():
    import torch

    picture = torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0))
    # The grid's centre lies between pixels, so half a pixel puts the samples onto them.
    video = clips.render(picture, [clips.Clip("pan_right", 200.5, 150.5, 1.0)])[0]
    shift = round(clips.PAN_PX_PER_FRAME * 4)
    assert torch.allclose(video[:, 4, :, :-shift], video[:, 0, :, shift:], atol=1e-3)


def test_the_same_cases_are_drawn_every_time():
    assert heldout.draw_cases(18) == heldout.draw_cases(18)
    assert {case.photograph for case in heldout.draw_cases(18)} == set(clips.HELD_OUT_PHOTOGRAPHS)
    assert [case.clip.motion for case in heldout.draw_cases(9)] == MOTIONS


@pytest.mark.slow
def test_motion_is_measured_right_on_true_clips():
    read, misread = 0, []
    for case in heldout.draw_cases(18)[9:]:
        video = case.truth()
        read += heldout.follows_caption(video, case)
        if case.clip.motion != "still":
            # Played backwards every moving clip shows another motion, and the frozen frame shows none.
            misread += [case.caption] if heldout.follows_caption(video[::-1], case) else []
            frozen = np.repeat(video[:1], len(video), axis=0)
            misread += [] if heldout.camera_motion(frozen)[0] == "still" else [case.caption]
    assert not misread
    assert read == 9


def test_an_object_that_goes_the_wrong_way_is_noticed():
    case = heldout.draw_cases(18)[9]
    moving = case.clip.moving_object
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[moving.direction]
    assert heldout.object_follows_caption(case.truth(), moving)
    assert not heldout.object_follows_caption(case.truth(), dataclasses.replace(moving, direction=opposite))
