"""Procedural clips: what the caption says is what the camera and the shapes do, at every size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.heldout import clips
from wanlab.heldout.clips import CAMERA_MOTIONS, HEIGHT, WIDTH

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


SIZES = [(64, 96, 9), (128, 192, 17), (192, 288, 25), (256, 384, 33)]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3), size=st.sampled_from(SIZES))
def test_shapes_stay_in_the_picture_and_in_the_caption(seed, count, size):
    height, width, frames = size
    clip = clips.draw_clip(
        (500, 500), np.random.default_rng(seed), objects=count, height=height, width=width, frames=frames
    )
    radius = clips.object_radius(height)
    for moving in clip.objects:
        for frame in (0, frames - 1):
            x, y = centre(moving, frame)
            assert radius <= x <= width - radius
            assert radius <= y <= height - radius
    shapes = [f"a {each.colour} {each.shape} moves {each.direction}" for each in clip.objects]
    assert clip.caption == ", ".join([CAMERA_MOTIONS[clip.motion], *shapes])
    assert len({each.colour for each in clip.objects}) == count


def centre(moving: clips.MovingObject, frame: int) -> tuple[float, float]:
    (x, y), (dx, dy) = (moving.start_x_px, moving.start_y_px), moving.step_px
    return x + frame * dx, y + frame * dy


def masks(clip: clips.Clip, frame: int) -> list[np.ndarray]:
    """Where each shape of a clip is in a frame, hidden or not, `[H, W]` each."""
    y, x = np.mgrid[: clip.height, : clip.width]
    made = []
    for moving in clip.objects:
        at_x, at_y = centre(moving, frame)
        radius = clips.object_radius(clip.height)
        made.append(clips.outline_distance(moving.shape, x - at_x, y - at_y, np, radius) < 0)
    return made


@pytest.mark.parametrize("size", [SIZES[1], SIZES[3]])
@pytest.mark.parametrize("count", [2, 3])
def test_most_clips_of_several_shapes_show_one_pass_in_front_of_another(size, count):
    height, width, frames = size
    generator, crossing = np.random.default_rng(count), 0
    for _ in range(40):
        clip = clips.draw_clip(
            (700, 700), generator, objects=count, height=height, width=width, frames=frames
        )
        assert np.sum(masks(clip, 0), axis=0).max() == 1  # none hides another in the first frame
        crossing += any(np.sum(masks(clip, frame), axis=0).max() > 1 for frame in range(frames))
    assert crossing >= 20


def test_an_earlier_shape_hides_a_later_one():
    red = clips.MovingObject("square", "red", "right", 50.0, 60.0)
    blue = clips.MovingObject("circle", "blue", "left", 110.0, 60.0)
    picture = torch.full((3, 300, 400), 0.5)
    for order in ((red, blue), (blue, red)):
        clip = clips.Clip("still", 200.0, 150.0, 1.0, order)
        frame = clips.render(picture, [clip])[0, :, 8]
        both = np.logical_and(*masks(clip, 8))
        assert both.sum() > 300
        shown = frame[:, torch.from_numpy(both)].median(dim=1).values
        assert torch.allclose(shown, torch.tensor(clips.COLOUR_RGB[order[0].colour]))


def test_a_photograph_as_narrow_as_the_view_is_drawn_from():
    for seed in range(200):  # in some the ends of an axis cross by a rounding
        clips.draw_clip((248, 103), np.random.default_rng(seed), objects=0)


def test_shapes_without_room_are_refused():
    with pytest.raises(WanlabError, match="take fewer frames"):
        clips.draw_clip((500, 500), np.random.default_rng(0), objects=1, height=64, width=64, frames=17)


@given(motion=st.sampled_from(MOTIONS), height=st.sampled_from([64, 128, 192, 256, 320]))
def test_the_edge_of_the_picture_moves_at_one_speed_at_every_size(motion, height):
    edges = {rows: np.array([0.0, -rows / 2, 1.0]) for rows in (128, height)}
    speeds = {
        rows: np.linalg.norm(np.diff(clips.camera_path(motion, 5, rows) @ edge, axis=0), axis=-1)
        for rows, edge in edges.items()
    }
    # A zoom is exponential, so that its speed changes sooner in a smaller picture; a step of a rotation is a chord.
    np.testing.assert_allclose(speeds[height], speeds[128], rtol=0.15 if "zoom" in motion else 1e-3)


@pytest.mark.parametrize("height", [128, 192, 256])
def test_a_zoom_is_whole_after_the_natural_frames(height):
    frames = clips.natural_frames(height)
    for motion, factor in (("zoom_in", 1 / 1.8), ("zoom_out", 1.8)):
        assert clips.camera_path(motion, frames, height)[-1, 0, 0] == pytest.approx(factor)
    assert frames == {128: 17, 192: 25, 256: 33}[height]


@pytest.mark.parametrize("size", [SIZES[1], SIZES[3]])
def test_a_shorter_clip_is_the_beginning_of_a_longer_one(size):
    height, width, frames = size
    picture = torch.rand(3, 500, 700, generator=torch.Generator().manual_seed(0))
    for seed, motion in enumerate(MOTIONS):
        clip = clips.draw_clip(
            (500, 700),
            np.random.default_rng(seed),
            motion=motion,
            objects=2,
            height=height,
            width=width,
            frames=frames,
        )
        whole = clips.render(picture, [clip])
        assert whole.shape == (1, 3, frames, height, width)
        assert torch.equal(clips.render(picture, [clip], frames=5), whole[:, :, :5])


def test_clips_of_several_pictures_are_rendered_as_alone():
    generator = np.random.default_rng(5)
    pictures = [
        torch.rand(3, side, 400, generator=torch.Generator().manual_seed(side)) for side in (300, 350)
    ]
    images = [pictures[0], pictures[0], pictures[1]]
    drawn = [
        clips.draw_clip(tuple(image.shape[1:]), generator, objects=i + 1) for i, image in enumerate(images)
    ]
    together = clips.render(images, drawn)
    for i, (image, clip) in enumerate(zip(images, drawn, strict=True)):
        assert torch.equal(together[i], clips.render(image, [clip])[0])
    with pytest.raises(ValueError, match="different heights"):
        clips.render(images[0], [drawn[0], dataclasses.replace(drawn[1], height=256)])


FIRST_TRUTHS = {
    "selection": [
        (0.4727913, 0.0284539),
        (0.2132290, 0.0480286),
        (0.3957344, 0.0239052),
        (0.3377423, 0.0341461),
        (0.3895887, 0.0250702),
        (0.4078567, 0.0530279),
    ],
    "final": [
        (0.5085131, 0.0668790),
        (0.2604951, 0.0902380),
        (0.4991145, 0.0641392),
        (0.4725655, 0.0749039),
        (0.5077940, 0.0640831),
        (0.5298910, 0.1343742),
    ],
}
"""Mean and mean absolute change between frames of the first cases of the fixed sets, which recorded figures are of."""


@pytest.mark.parametrize("name", FIRST_TRUTHS)
def test_the_fixed_sets_show_what_they_always_showed(name):
    truths = [case.truth() for case in heldout.load_cases(name, len(FIRST_TRUTHS[name]))]
    figures = [(float(truth.mean()), float(np.abs(np.diff(truth, axis=0)).mean())) for truth in truths]
    np.testing.assert_allclose(figures, FIRST_TRUTHS[name], atol=2e-6)


def test_a_pan_moves_the_picture_by_whole_pixels():
    picture = torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0))
    # The grid's centre lies between pixels, so half a pixel puts the samples onto them.
    video = clips.render(picture, [clips.Clip("pan_right", 200.5, 150.5, 1.0)])[0]
    shift = round(clips.PAN_PX_PER_FRAME * 4)
    assert torch.allclose(video[:, 4, :, :-shift], video[:, 0, :, shift:], atol=1e-3)


def test_the_same_cases_are_drawn_every_time():
    assert heldout.draw_cases(18) == heldout.draw_cases(18)
    assert {case.photograph for case in heldout.draw_cases(18)} == set(clips.HELD_OUT_PHOTOGRAPHS)
    assert [case.clip.motion for case in heldout.draw_cases(9)] == MOTIONS


def test_a_picture_too_flat_for_a_case_gives_way_to_the_next():
    cases = heldout.draw_cases(2, photographs=("cell.png", "coffee.png"))
    assert [case.photograph for case in cases] == ["coffee.png", "coffee.png"]


@pytest.mark.parametrize(
    "content", [heldout.size_content("large"), {"objects": (0, 1, 2, 3), "textures": 0.25}]
)
def test_an_examination_has_all_its_cases(content):
    assert len(heldout.draw_cases(72, **content)) == 72


@pytest.mark.parametrize(("height", "frames"), [(128, 17), (256, 33)])
def test_cases_of_every_size_carry_it_and_show_photographs_and_textures(height, frames):
    width = height * 3 // 2
    cases = heldout.draw_cases(18, seed=4, height=height, width=width, objects=(3, 1), textures=0.5)
    assert cases == heldout.draw_cases(18, seed=4, height=height, width=width, objects=(3, 1), textures=0.5)
    assert [len(case.clip.objects) for case in cases] == [3] * 9 + [1] * 9
    shown = [case.photograph.startswith(heldout.TEXTURE) for case in cases]
    assert 3 <= sum(shown) <= 15
    for case in (cases[shown.index(True)], cases[shown.index(False)]):
        truth = case.truth()
        assert truth.shape == (frames, height, width, 3)
        assert np.array_equal(case.truth(2), truth[:2])
