"""wan-nano and a request of a video, for tests of techniques."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from support.distances import far

from wanlab import models, techniques

SETTINGS = {"height": 64, "width": 96, "frames": 5, "steps": 4, "output": "latent"}


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, one request, and the video that it makes without techniques."""

    model: models.Model
    image: np.ndarray
    video: np.ndarray
    prompt: str = "the camera pans left"

    def generate(self, model, **settings):
        return model.generate(self.image, self.prompt, **(SETTINGS | settings)).video

    def switched_on(self, chosen, **settings):
        """The techniques, and the video with them."""
        switched = techniques.switch_on(self.model, chosen)
        return switched, self.generate(switched.model, **settings)

    def far(self, video):
        return far(video, self.video)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is remembered over processes is remembered for these tests alone."""
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def request_of_a_video():
    return np.random.default_rng(0).random((64, 96, 3), dtype=np.float32), "the camera pans left"


@pytest.fixture(scope="session")
def bench():
    """wan-nano with both experts."""
    model = models.load("wan-nano", device="cpu")
    image = np.random.default_rng(0).random((64, 96, 3), dtype=np.float32)
    bench = Bench(model, image, np.empty(0))
    return Bench(model, image, bench.generate(model))
