"""Textures: regular pictures whose continuation can be told from what is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.feature import match_template

from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.heldout import clips, textures


@pytest.mark.parametrize("kind", textures.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_uncovered_goes_on_as_what_was_seen(kind, seed, monkeypatch):
    monkeypatch.setattr(textures, "KINDS", (kind,))
    picture = textures.texture(np.random.default_rng(seed), (300, 640))
    assert picture.shape == (3, 300, 640)
    assert 0 <= picture.min() < picture.max() <= 1
    assert picture.isfinite().all()
    grey = picture.mean(dim=0).numpy()
    # A part of the right half is found again, in all its detail, in the left half.
    uncovered = grey[100:170, 500:570]
    assert match_template(grey[:, :400], uncovered).max() > 0.9
    assert heldout.has_texture(picture.permute(1, 2, 0).numpy())


def test_a_texture_is_a_value_of_its_seed():
    one, two, other = (textures.texture(np.random.default_rng(seed), (64, 96)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    picture = heldout.picture("texture:1")
    assert picture.shape == (*textures.SIZE_PX, 3)
    assert picture.dtype == np.float32
    with pytest.raises(WanlabError, match="such as texture:7"):
        heldout.picture("texture:plaid")


def test_textures_leave_the_colours_of_shapes_to_shapes():
    shapes = torch.tensor(list(clips.COLOUR_RGB.values()))
    for seed in range(30):
        picture = textures.texture(np.random.default_rng(seed), (96, 96)).flatten(1).T
        distance = (picture[:, None] - shapes).square().mean(dim=-1).sqrt().min(dim=1).values
        assert (distance < 0.1).float().mean() < 0.05
