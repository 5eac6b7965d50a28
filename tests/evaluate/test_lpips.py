from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.evaluate import lpips as module

REPOSITORY = Path(__file__).resolve().parents[2]


def hub_with_squeezenet() -> Path | None:
    """A torch home that holds SqueezeNet: the user's own, or test data kept beside the repository."""
    file = Path("hub") / "checkpoints" / module.HUB_FILES["lpips-squeeze"][0]
    default = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    homes = [default, REPOSITORY.parent / "shared" / "torch"]
    return next((home for home in homes if (home / file).is_file()), None)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 8, 12, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return image, (image + 0.2 * torch.rand(image.shape, generator=generator)).clamp(0, 1)


def test_default_backbone_works_offline_and_quietly(pair, capfd, recwarn, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing cached, nothing to find
    module._build.cache_clear()
    gc.collect()
    recwarn.clear()  # of what earlier tests left open
    values = module.distances(*pair)
    assert values.shape == (2,)
    assert values.dtype == torch.float64
    assert ((values > 0.001) & (values < 1.5)).all()
    assert module.distances(pair[0], pair[0]).tolist() == [0, 0]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not recwarn.list
    assert not list(tmp_path.iterdir())
    assert module.load_backbone("auto") is module.load_backbone("stlpips-alex")  # built once


def test_default_backbone_tolerates_a_shift_that_lpips_would_not():
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 65, 65, generator=generator)
    shifted = module.distances(image[..., :64, :64], image[..., 1:, 1:])
    other = module.distances(image[..., :64, :64], torch.rand(1, 3, 64, 64, generator=generator))
    assert shifted < 0.6 * other


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.integers(32, 70), st.integers(32, 70))
def test_distance_is_symmetric_and_not_negative(seed, height, width):
    a, b = torch.rand(2, 1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    forth, back = module.distances(a, b), module.distances(b, a)
    assert forth.item() >= 0
    assert forth.item() == pytest.approx(back.item(), rel=1e-4, abs=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_official_backbone_is_exact_or_refused(pair, monkeypatch):
    home = hub_with_squeezenet()
    if home is None:
        with pytest.raises(WanlabError, match=r"squeezenet1_1-b8a52dc0\.pth"):
            module.load_backbone("lpips-squeeze")
        return
    monkeypatch.setenv("TORCH_HOME", str(home))
    values = module.distances(*pair, "lpips-squeeze")
    import lpips

    with torch.no_grad():
        expected = lpips.LPIPS(net="squeeze", verbose=False)(pair[0] * 2 - 1, pair[1] * 2 - 1).flatten()
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert module.distances(pair[0], pair[0], "lpips-squeeze").tolist() == [0, 0]
    frames = [image.permute(0, 2, 3, 1).numpy() for image in pair]
    scores = evaluate.compare_videos(*frames, metrics="lpips", backbone="lpips-squeeze", progress=False)
    assert scores.backbone == "lpips-squeeze"
    assert scores.mean() == pytest.approx(values.mean().item(), rel=1e-5)
    assert scores.mean() != pytest.approx(module.distances(*pair).mean().item(), rel=0.01)


def test_scores_and_maps_are_those_of_the_package(pair):
    network = module.load_backbone()
    with torch.inference_mode():
        expected = network(pair[0] * 2 - 1, pair[1] * 2 - 1).flatten()
        np.testing.assert_allclose(module.distances(*pair), expected, atol=1e-6)
        network.spatial = True
        try:
            expected = network(pair[0] * 2 - 1, pair[1] * 2 - 1)[:, 0]
        finally:
            network.spatial = False
    maps = module.distance_maps(*pair)
    assert maps.shape == (2, *pair[0].shape[-2:])
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    # A change in one corner is seen in that corner.
    corner = pair[0].clone()
    corner[..., :16, :16] = 1 - corner[..., :16, :16]
    here = module.distance_maps(pair[0], corner)
    assert here[:, :24, :24].mean() > 5 * here[:, 40:, 60:].mean()


def test_convolutions_on_a_gpu_take_no_tf32():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark
    assert before[0]  # as PyTorch sets it up
    with module.exact_float32("cuda:0"):
        assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark) == (False, *before[1:])
    assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark) == before


KERNEL = """
import torch
from wanlab.evaluate.lpips import _by_triton, by_torch
generator = torch.Generator().manual_seed(0)
for channels in (64, 192, 384):
    for layout in (torch.contiguous_format, torch.channels_last):
        pair = [torch.rand(2, channels, 5, 9, generator=generator).relu().to(memory_format=layout) for _ in "ab"]
        pair[1][0, :, 0, 0] = 0  # a pixel without any feature
        weight = torch.rand(channels, generator=generator)
        torch.testing.assert_close(_by_triton(*pair, weight), by_torch(*pair, weight), atol=1e-6, rtol=1e-5)
print("same")
"""


def test_the_kernel_for_gpus_computes_the_same():
    pytest.importorskip("triton")
    # The interpreter of Triton runs it on the CPU; it is chosen at the first import.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize("name", module.HUB_FILES)
def test_missing_backbone_file_is_named_and_never_downloaded(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("tried to download"))
    with pytest.raises(WanlabError) as error:
        evaluate.compare_videos(
            np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 3)), backbone=name, progress=False
        )
    message = str(error.value)
    for part in (name, module.HUB_FILES[name][0], str(tmp_path), "torchvision.models", "stlpips-alex"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", module.HUB_FILES)
def test_file_names_are_those_of_torchvision(name):
    from torchvision import models

    file, maker = module.HUB_FILES[name]
    weights = models.get_model_weights(maker)["IMAGENET1K_V1"]
    assert weights.url.rsplit("/", 1)[-1] == file


def test_damaged_backbone_file_is_named(monkeypatch, tmp_path):
    file = tmp_path / "hub" / "checkpoints" / module.HUB_FILES["lpips-squeeze"][0]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WanlabError, match="cannot be loaded; delete it") as error:
        module.load_backbone("lpips-squeeze")
    assert str(file) in str(error.value)


def test_what_is_available_is_said_without_loading(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = {backbone.name: backbone for backbone in evaluate.available_backbones()}
    assert tuple(found) == evaluate.BACKBONES
    assert found["stlpips-alex"].available
    assert not found["lpips-vgg"].available
    assert "vgg16" in found["lpips-vgg"].note
    file = tmp_path / "hub" / "checkpoints" / module.HUB_FILES["lpips-vgg"][0]
    file.parent.mkdir(parents=True)
    file.touch()
    assert {b.name for b in evaluate.available_backbones() if b.available} == {"stlpips-alex", "lpips-vgg"}
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert {b.note for b in evaluate.available_backbones()} == {
        "pip install stlpips-pytorch",
        "pip install lpips",
    }


def test_importing_is_cheap():
    code = (
        "import sys, wanlab.measure, wanlab.evaluate, wanlab.cli.evaluate; "
        "print([m for m in ('torch', 'av', 'pandas', 'lpips', 'diffusers', 'skimage') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"
