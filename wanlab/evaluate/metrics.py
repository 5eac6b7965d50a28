"""PSNR and SSIM, and the comparison of two videos frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean
from wanlab.evaluate import lpips
from wanlab.evaluate.scores import METRICS, NO_BACKBONE, Scores, long_table
from wanlab.evaluate.video import Video, as_video

if TYPE_CHECKING:
    import torch

FPS_TOLERANCE = 1e-3  # relative; containers round rates such as 30000/1001
# Pixels scored at a time; a CPU is fastest in its cache, a GPU when it is full.
BATCH_PIXELS = {"cpu": 200_000, "cuda": 4_000_000}

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def compare_videos(
    original,
    optimized,
    metrics: Sequence[str] | str = METRICS,
    backbone: str = "auto",
    device="auto",
    progress: bool = True,
) -> Scores:
    """Score an optimised video against the original, frame by frame.

    Float arrays are scored as they are, not rounded to 8 bits.

    Args:
        original, optimized: path, `Video`, array `[T, H, W, 3]` (uint8, or float in `[0, 1]`), or an
            object with `.video` and `.fps` such as a generation.
        metrics: names of `METRICS`, or `"all"`.
        backbone: LPIPS backbone; `"auto"` is the shift-tolerant one, which needs no download.
        device: `"auto"` takes the GPU when there is one.
        progress: show a progress bar.

    Raises:
        WanlabError: unreadable video, different length, size or frame rate (both values are given),
            unknown metric or backbone, backbone not on this machine, frames too small.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    names = _metric_names(metrics)
    backbone = lpips.resolve(backbone)
    a, b = as_video(original, name="original"), as_video(optimized, name="optimized")
    _same_geometry(a, b)
    device = _device(device)
    if "lpips" in names:
        lpips.load_backbone(backbone, device)  # refuse before the work, not in the middle of it
    batch = max(1, BATCH_PIXELS["cuda" if device.type == "cuda" else "cpu"] // (a.height * a.width))
    score = {
        "psnr": psnr,
        "ssim": ssim,
        "lpips": lambda x, y: lpips.distances(x, y, backbone),
    }
    values: dict[str, list] = {name: [] for name in names}
    with (
        torch.inference_mode(),
        tqdm(total=a.length, desc="comparing", unit="frame", leave=False, disable=not progress) as bar,
    ):
        for start in range(0, a.length, batch):
            x, y = (_tensor(video.frames[start : start + batch], device) for video in (a, b))
            for name in names:
                values[name].append(score[name](x, y).cpu().numpy())
            bar.update(len(x))
    table = {
        (name, backbone if name == "lpips" else NO_BACKBONE): np.concatenate(parts)
        for name, parts in values.items()
    }
    fps = a.fps if a.fps is not None else b.fps
    return Scores(long_table(table), a.path, b.path, a.length, a.height, a.width, fps)


def psnr(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame in dB, 10 log10(1 / MSE) over all pixels and channels.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`.

    Returns:
        float64 `[N]`; infinite for equal frames.
    """
    error = (original.double() - optimized.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each frame (Wang et al., 2004), mean over pixels and channels.

    Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 1, borders where
    the window does not fit left out: scikit-image's `structural_similarity` with `gaussian_weights`.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, at least 11 pixels a side.

    Returns:
        float64 `[N]`; 1 for equal frames.

    Raises:
        WanlabError: frames under 11 pixels a side.
    """
    import torch
    import torch.nn.functional as functional

    height, width = original.shape[-2:]
    size = 2 * _SSIM_RADIUS + 1
    if min(height, width) < size:
        raise WanlabError(f"SSIM needs frames of at least {size}x{size}; these are {height}x{width}")
    offset = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, device=original.device, dtype=torch.float32)
    window = torch.exp(-0.5 * (offset / _SSIM_SIGMA) ** 2)
    window = window / window.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1).unsqueeze(1)  # [N * 3, 1, H, W]
        flat = functional.conv2d(flat, window.view(1, 1, -1, 1))
        return functional.conv2d(flat, window.view(1, 1, 1, -1))

    # Variances do not change with the origin; one in the middle halves the rounding error.
    x, y = original.float() - 0.5, optimized.float() - 0.5
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x * mean_x
    variance_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance_x + variance_y + _SSIM_C2)
    return (luminance * structure).double().view(len(original), -1).mean(1)


def _metric_names(metrics: Sequence[str] | str) -> list[str]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if "all" in names:
        return list(METRICS)
    for name in names:
        if name not in METRICS:
            raise WanlabError(
                f"unknown metric {name!r}{did_you_mean(name, METRICS)}; known: {', '.join(METRICS)}, all"
            )
    if not names:
        raise WanlabError(f"no metric given; known: {', '.join(METRICS)}, all")
    return list(dict.fromkeys(names))


def _same_geometry(a: Video, b: Video) -> None:
    differences = []
    if a.length != b.length:
        differences.append(f"length ({a.length} and {b.length} frames)")
    if (a.height, a.width) != (b.height, b.width):
        differences.append(f"size ({a.height}x{a.width} and {b.height}x{b.width})")
    if a.fps is not None and b.fps is not None and abs(a.fps - b.fps) > FPS_TOLERANCE * max(a.fps, b.fps):
        differences.append(f"frame rate ({a.fps:g} and {b.fps:g} fps)")
    if differences:
        raise WanlabError(
            f"{a.path} and {b.path} differ in {', '.join(differences)}; "
            "generate both with the same frames, height, width and fps"
        )


def _device(device) -> torch.device:
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise WanlabError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WanlabError("device is cuda but PyTorch sees no GPU; use auto or cpu")
    return device


def _tensor(frames, device: torch.device) -> torch.Tensor:
    """`[N, H, W, 3]` uint8 or float -> float32 `[N, 3, H, W]` in `[0, 1]`."""
    import numpy as np
    import torch

    scale = 255 if frames.dtype == np.uint8 else 1
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).to(device).float() / scale
    return tensor.permute(0, 3, 1, 2).contiguous()
