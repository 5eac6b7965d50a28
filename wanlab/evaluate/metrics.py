"""The comparison of two videos: whole clips, in batches that fit the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean
from wanlab.evaluate import lpips, temporal
from wanlab.evaluate.catalogue import ALL_METRICS, CATALOGUE, METRICS, TEMPORAL
from wanlab.evaluate.frames import ms_ssim, psnr, scales, ssim
from wanlab.evaluate.scores import NO_BACKBONE, Scores, long_table
from wanlab.evaluate.video import Video, as_video

if TYPE_CHECKING:
    import numpy as np
    import torch

FPS_TOLERANCE = 1e-3  # relative; containers round rates such as 30000/1001
# Pixels scored at a time; a CPU is fastest in its cache, a GPU when it is full.
BATCH_PIXELS = {"cpu": 100_000, "cuda": 8_000_000}
# Memory that scoring takes at most, both sides together; the widest are the full-size features of LPIPS.
BYTES_PER_PIXEL = {"lpips-alex": 600, "lpips-squeeze": 1200, "lpips-vgg": 3000, "stlpips-alex": 3000}
FREE_SHARE = 0.6


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
        metrics: names of `ALL_METRICS` (`CATALOGUE` says what each is), or `"all"`: those that the
            clip is long enough for.
        backbone: LPIPS backbone; `"auto"` is the shift-tolerant one, which needs no download.
        device: `"auto"` takes the GPU when there is one.
        progress: show a progress bar.

    Raises:
        WanlabError: unreadable video, different length, size or frame rate (both values are given),
            unknown metric or backbone, backbone not on this machine, frames too small, one frame
            where a metric needs two.
    """
    import torch
    from tqdm.auto import tqdm

    names = _metric_names(metrics)
    backbone = lpips.resolve(backbone)
    a, b = as_video(original, name="original"), as_video(optimized, name="optimized")
    same_geometry(a, b)
    names = _long_enough(names, a, everything=metrics == "all" or "all" in metrics)
    device = device_of(device)
    if "lpips" in names:
        lpips.load_backbone(backbone, device)  # refuse before the work, not in the middle of it
    batch = _batch(a, device, backbone if "lpips" in names else None)
    parts: dict[str, list[np.ndarray]] = {}
    with (
        torch.inference_mode(),
        tqdm(total=a.length, desc="comparing", unit="frame", leave=False, disable=not progress) as bar,
    ):
        before = None
        for start in range(0, a.length, batch):
            x, y = (to_tensor(video.frames[start : start + batch], device) for video in (a, b))
            found = _score_frames(x, y, names, backbone)
            # What looks at two frames gets the last of the batch before as well.
            pair = (x, y) if before is None else (torch.cat([before[0], x]), torch.cat([before[1], y]))
            if len(pair[0]) > 1:
                found |= _score_pairs(*pair, names)
            before = x[-1:].clone(), y[-1:].clone()
            for name, values in found.items():
                parts.setdefault(name, []).append(values.cpu().numpy())
            bar.update(len(x))
    fps = a.fps if a.fps is not None else b.fps
    table = _joined(parts, names, backbone, f"{scales(a.height, a.width)} scales")
    return Scores(long_table(table), a.path, b.path, a.length, a.height, a.width, fps)


def _score_frames(x: torch.Tensor, y: torch.Tensor, names: list[str], backbone: str) -> dict:
    score = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    found = {name: score[name](x, y) for name in names if name in score}
    if "lpips" in names:
        found["lpips"] = lpips.distances(x, y, backbone)
    return found


def _score_pairs(x: torch.Tensor, y: torch.Tensor, names: list[str]) -> dict:
    found = {}
    if "flicker" in names:
        found["flicker"] = temporal.flicker(x, y)
    if "motion_ratio" in names:
        found["motion of the original"], found["motion_ratio"] = temporal.motion(x), temporal.motion(y)
    if "warp_error" in names:
        own, error = temporal.warp_errors(x, y)
        found["warp_error"] = error - own
    return found


def _joined(parts: dict, names: list[str], backbone: str, scales: str) -> dict:
    import numpy as np

    whole = {name: np.concatenate(values) for name, values in parts.items()}
    if "motion_ratio" in names:
        whole["motion_ratio"] = temporal.motion_ratio(whole["motion of the original"], whole["motion_ratio"])
    variant = {"lpips": backbone, "ms_ssim": scales}
    return {(name, variant.get(name, NO_BACKBONE)): whole[name] for name in names}


def _batch(video: Video, device: torch.device, backbone: str | None) -> int:
    """Frames to score at a time: what the processor likes, and on a GPU no more than its free memory holds."""
    import torch

    pixels = BATCH_PIXELS["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What PyTorch has set aside and does not use can be used again.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        pixels = min(pixels, int(FREE_SHARE * free) // BYTES_PER_PIXEL.get(backbone, 600))
    return max(1, pixels // (video.height * video.width))


def _long_enough(names: list[str], video: Video, *, everything: bool) -> list[str]:
    late = [name for name in names if name in TEMPORAL] if video.length < 2 else []
    if late and not everything:
        raise WanlabError(f"{late[0]} looks at two frames and {video.path} has one; give a longer video")
    return [name for name in names if name not in late]


def _metric_names(metrics: Sequence[str] | str) -> list[str]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if "all" in names:
        return list(ALL_METRICS)
    known = f"known: {', '.join(ALL_METRICS)}, all"
    for name in names:
        if name not in CATALOGUE:
            raise WanlabError(f"unknown metric {name!r}{did_you_mean(name, ALL_METRICS)}; {known}")
    if not names:
        raise WanlabError(f"no metric given; {known}")
    return list(dict.fromkeys(names))


def same_geometry(a: Video, b: Video) -> None:
    """Refuse two videos of different length, size or frame rate.

    Raises:
        WanlabError: they differ; both values are given.
    """
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


def device_of(device) -> torch.device:
    """A device by name; `"auto"` is the GPU where there is one.

    Raises:
        WanlabError: unknown name, or a GPU that PyTorch does not see.
    """
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


def to_tensor(frames, device: torch.device) -> torch.Tensor:
    """Frames `[N, H, W, 3]`, uint8 or float, as float32 `[N, 3, H, W]` in `[0, 1]` on a device."""
    import numpy as np
    import torch

    scale = 255 if frames.dtype == np.uint8 else 1
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).to(device).float() / scale
    return tensor.permute(0, 3, 1, 2).contiguous()
