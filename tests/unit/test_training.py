"""The pieces of the recipe that can be wrong without anyone noticing: schedules, noise ranges, averages, data."""

from __future__ import annotations

import itertools

import pytest
import torch

from training import common, experts, text, vae
from wanlab.nano import architecture


def test_each_expert_learns_only_its_own_noise_range():
    high, low = (experts.draw_sigma(name, 20000, torch.device("cpu")) for name in ("high", "low"))
    assert high.min() >= architecture.BOUNDARY_RATIO - 1e-6
    assert low.max() <= architecture.BOUNDARY_RATIO + 1e-6
    assert high.max() <= 1
    assert low.min() >= 0
    assert high.max() > 0.999
    assert low.min() < 0.01


def test_noise_levels_are_those_that_sampling_visits():
    """The scheduler's own sigmas lie on the curve the training draws from."""
    scheduler = architecture.scheduler()
    scheduler.set_timesteps(architecture.STEPS)
    sigmas = scheduler.sigmas[:-1]
    drawn = torch.cat([experts.draw_sigma(name, 50000, torch.device("cpu")) for name in ("high", "low")])
    for sigma in sigmas[sigmas < 0.999]:
        assert (drawn - sigma).abs().min() < 1e-2
    assert int((sigmas >= architecture.BOUNDARY_RATIO).sum()) == 4


def test_learning_rate_rises_then_falls():
    rates = [common.cosine(x / 100) for x in range(101)]
    assert rates[0] < rates[2]
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


def test_a_budget_in_steps_ends_exactly_there():
    budget = common.Budget(None, 40, common.Ranks())
    assert budget.progress(39) < 1
    assert budget.progress(40) == 1


def test_average_follows_the_parameters():
    module = torch.nn.Linear(2, 2)
    average = common.Average(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(3.0)
    for _ in range(200):
        average.update(module)
    other = torch.nn.Linear(2, 2)
    average.copy_to(other)
    assert torch.allclose(other.weight, torch.full((2, 2), 3.0), atol=1e-3)


def test_pictures_give_clips_and_captions_from_a_seed():
    first, second = (common.Pictures(torch.device("cpu"), 7, 0).batch(3, 5) for _ in range(2))
    assert first[0].shape == (3, 3, 5, architecture.HEIGHT, architecture.WIDTH)
    assert first[1] == second[1]
    assert torch.equal(first[0], second[0])
    assert first[0].abs().max() <= 1


def test_dead_leaves_are_pictures():
    images = common.dead_leaves_images(
        2, torch.Generator().manual_seed(0), torch.device("cpu"), size=64, leaves=30
    )
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.05


def test_gradient_loss_sees_blur_and_not_brightness():
    picture = torch.rand(1, 3, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool3d(picture, (1, 3, 3), stride=1, padding=(0, 1, 1))
    assert vae.gradient_loss(picture + 0.5, picture) < 1e-5
    assert vae.gradient_loss(blurred, picture) > 0.05


def test_text_encoder_learns_the_captions_in_seconds():
    _, accuracy = text.train(steps=120, seed=0)
    assert accuracy > 0.9
