"""Metrics of two videos, per frame and over time, computed in batches that fit the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.evaluate import lpips
from wanlab.evaluate.catalogue import ALL_METRICS, CATALOGUE, METRICS, TEMPORAL
from wanlab.evaluate.scores import NO_BACKBONE, Scores, long_table
from wanlab.evaluate.video import VideoLike, as_video

_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2
WINDOW = 2 * _RADIUS + 1
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales of MS-SSIM, fine to coarse (Wang et al. 2003, section 3.2)."""


def laplacian(grey):
    """The Laplacian of pictures `[..., H, W]`, an array or a tensor, without their edge: `[..., H - 2, W - 2]`."""
    centre = grey[..., 1:-1, 1:-1]
    columns = 4 * centre - grey[..., :-2, 1:-1] - grey[..., 2:, 1:-1]
    return columns - grey[..., 1:-1, :-2] - grey[..., 1:-1, 2:]


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

    Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 1, without the borders
    where the window does not fit: scikit-image's `structural_similarity` with `gaussian_weights`.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, at least 11 pixels per side.

    Returns:
        float64 `[N]`; 1 for equal frames.

    Raises:
        WanlabError: frames under 11 pixels per side.
    """
    _check_size(original, "SSIM")
    luminance, structure = _similarity(original.float(), optimized.float())
    return (luminance * structure).double().flatten(1).mean(1)


def scales(height: int, width: int) -> int:
    """Number of MS-SSIM scales for frames of this size; 5, the published number, from 176 pixels per side."""
    fitting = [level for level in range(len(SCALE_WEIGHTS)) if min(height, width) >> level >= WINDOW]
    return len(fitting)


def ms_ssim(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity of each frame (Wang, Simoncelli and Bovik, 2003), mean over channels.

    Five scales, each half of the one before. Frames under 176 pixels per side have fewer: the weights of
    those that fit are rescaled to add up to 1. Scores with different numbers of scales must not be compared.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, at least 11 pixels per side.

    Returns:
        float64 `[N]`; 1 for equal frames.

    Raises:
        WanlabError: frames under 11 pixels per side.
    """
    _check_size(original, "MS-SSIM")
    count = scales(*original.shape[-2:])
    weights = [weight / sum(SCALE_WEIGHTS[:count]) for weight in SCALE_WEIGHTS[:count]]
    x, y = original.float(), optimized.float()
    score = torch.ones(original.shape[:2], dtype=torch.float64, device=original.device)
    for level, weight in enumerate(weights):
        if level:
            odd = [side % 2 for side in x.shape[-2:]]
            x, y = (functional.avg_pool2d(side, 2, padding=odd) for side in (x, y))
        luminance, structure = _similarity(x, y)
        each = luminance * structure if level == count - 1 else structure
        # A negative (anticorrelated) scale is set to 0: its root would be NaN.
        score *= each.double().mean((2, 3)).clamp(min=0) ** weight
    return score.mean(1)


def _check_size(frames: torch.Tensor, name: str) -> None:
    height, width = frames.shape[-2:]
    if min(height, width) < WINDOW:
        raise WanlabError(f"{name} needs frames of at least {WINDOW}x{WINDOW}; these are {height}x{width}")


def _similarity(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance term, and contrast times structure, where the window fits: `[N, 3, H - 10, W - 10]` each."""
    offset = torch.arange(-_RADIUS, _RADIUS + 1, device=x.device, dtype=torch.float32)
    window = torch.exp(-0.5 * (offset / _SIGMA) ** 2)
    window = window / window.sum()

    def blur(z: torch.Tensor) -> torch.Tensor:
        flat = z.flatten(0, 1).unsqueeze(1)  # [N * 3, 1, H, W]
        flat = functional.conv2d(flat, window.view(1, 1, -1, 1))
        return functional.conv2d(flat, window.view(1, 1, 1, -1)).view(*z.shape[:2], *_inner(z))

    # Variances do not depend on the origin; an origin in the middle halves the rounding error.
    x, y = x - 0.5, y - 0.5
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x * mean_x
    variance_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return luminance, structure


def _inner(z: torch.Tensor) -> tuple[int, int]:
    return z.shape[2] - 2 * _RADIUS, z.shape[3] - 2 * _RADIUS


RADIUS, WARPS, SMALLEST_SIDE = 7, 10, 16
DETERMINANT = 1e-14


def optical_flow(frames: torch.Tensor, previous: torch.Tensor, *, warps: int = WARPS) -> torch.Tensor:
    """Optical flow from each frame to the frame before, by iterative Lucas-Kanade on a pyramid.

    The method and its constants are those of `skimage.registration.optical_flow_ilk` (Le Besnerais and Champagnat,
    "Dense optical flow by iterative local window registration", 2005), which takes one pair at a time on the CPU.

    Args:
        frames, previous: `[N, H, W]` grey, in `[0, 1]`.
        warps: refinements on each level of the pyramid.

    Returns:
        `[N, 2, H, W]` in pixels (y, x): `frames[n][p]` shows the same as `previous[n][p + flow]`.
    """
    pyramid = [(frames[:, None].float(), previous[:, None].float())]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST_SIDE:
        size = [(side + 1) // 2 for side in pyramid[-1][0].shape[-2:]]
        pyramid.append(
            tuple(functional.interpolate(x, size, mode="bilinear", antialias=True) for x in pyramid[-1])
        )
    flow = torch.zeros(len(frames), 2, *pyramid[-1][0].shape[-2:], device=frames.device)
    for reference, moving in reversed(pyramid):
        size = reference.shape[-2:]
        if flow.shape[-2:] != size:
            grown = [new / old for new, old in zip(size, flow.shape[-2:], strict=True)]
            scale = torch.tensor(grown, device=flow.device).view(1, 2, 1, 1)
            flow = functional.interpolate(flow, size, mode="bilinear", align_corners=False) * scale
        for _ in range(warps):
            flow = _refined(reference, moving, flow)
    return flow


def _refined(reference: torch.Tensor, moving: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    warped = warp(moving, flow)
    gy, gx = (torch.gradient(warped, dim=axis)[0] for axis in (2, 3))
    error = gy * flow[:, :1] + gx * flow[:, 1:] + reference - warped
    terms = torch.cat([gy * gy, gy * gx, gx * gx, gy * error, gx * error], dim=1)
    yy, yx, xx, by, bx = _window_mean(terms).double().split(1, dim=1)
    determinant = yy * xx - yx * yx
    known = determinant.abs() >= DETERMINANT  # elsewhere there is no texture, and the flow is 0
    determinant = torch.where(known, determinant, torch.ones_like(determinant))
    solved = torch.cat([xx * by - yx * bx, yy * bx - yx * by], dim=1) / determinant
    return torch.where(known, solved, torch.zeros_like(solved)).float()


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    side = 2 * RADIUS + 1
    x = functional.pad(x, (RADIUS,) * 4, mode="reflect")
    return functional.avg_pool2d(functional.avg_pool2d(x, (side, 1), 1), (1, side), 1)


def warp(frames: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Frames `[N, C, H, W]` sampled at `p + flow`, bilinear; outside, the nearest pixel of the edge."""
    y, x, (height, width) = *_target(flow), frames.shape[-2:]
    grid = _unit(x, width), _unit(y, height)
    return functional.grid_sample(
        frames, _stack(grid), mode="bilinear", padding_mode="border", align_corners=True
    )


def inside(flow: torch.Tensor) -> torch.Tensor:
    """Pixels whose source is inside the frame before: bool `[N, 1, H, W]`."""
    y, x, (height, width) = *_target(flow), flow.shape[-2:]
    return ((y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1))[:, None]


def _target(flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = flow.shape[-2:]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).view(1, -1, 1)
    x = torch.arange(width, device=flow.device, dtype=flow.dtype).view(1, 1, -1)
    return y + flow[:, 0], x + flow[:, 1]


def _unit(position: torch.Tensor, size: int) -> torch.Tensor:
    return 2 * position / max(size - 1, 1) - 1


def _stack(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.stack(pair, dim=-1)


STILL = 0.1 / 255
"""A tenth of an 8-bit step, added to the original's motion, so that the ratio exists for a still original too."""

FLOW_SIDE = 96
"""Length of the shorter side, in pixels, at which flow is computed; relevant motion is visible at this size."""

VISIBILITY = 50.0
"""alpha of Lai et al. 2018: a pixel has weight exp(-alpha |O[t] - warped O[t-1]|^2), almost 0 where it was uncovered."""


def flicker(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Change from frame to frame that the original does not have: mean |(Q[t] - Q[t-1]) - (O[t] - O[t-1])|.

    A constant difference (a colour cast, a blur of a still scene) does not count; one that changes over time does.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, consecutive frames.

    Returns:
        float64 `[N - 1]`, in intensity, for frames 1 to N - 1.
    """
    error = optimized - original
    return (error[1:] - error[:-1]).abs().double().flatten(1).mean(1)


def motion(frames: torch.Tensor) -> torch.Tensor:
    """Motion energy, mean |X[t] - X[t-1]|: float64 `[N - 1]` in intensity."""
    return (frames[1:] - frames[:-1]).abs().double().flatten(1).mean(1)


def motion_ratio(original: np.ndarray, optimized: np.ndarray) -> np.ndarray:
    """Motion of the optimised video over that of the original, from the motion energies of a whole clip.

    The mean over frames is the ratio of the clip's energies; a frame's value is its contribution to that ratio, since
    a frame in which the original hardly moves has no useful ratio of its own.
    """
    return 1 + (optimized - original) / (original.mean() + STILL)


def warp_errors(original: torch.Tensor, optimized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change along the original's motion, in the original and in the optimised video.

    E_warp of Lai et al., "Learning Blind Video Temporal Consistency" (2018): each frame minus the frame before, warped
    along the optical flow of the original, masked to pixels that show the same thing in both frames of the original. Root
    mean square over pixels, with a shorter side of `FLOW_SIDE` pixels.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, consecutive frames.

    Returns:
        float64 `[N - 1]` in intensity, for the original and for the optimised video.
    """
    small = [_shrunk(frames) for frames in (original, optimized)]
    grey = small[0].mean(1)
    flow = optical_flow(grey[1:], grey[:-1])
    moved = [frames[1:] - warp(frames[:-1], flow) for frames in small]
    visibility = torch.exp(-VISIBILITY * moved[0].square().sum(1, keepdim=True)) * inside(flow)
    weight = visibility.double().flatten(1).sum(1).clamp(min=1e-9)
    first, second = (
        ((error.square().mean(1, keepdim=True) * visibility).double().flatten(1).sum(1) / weight).sqrt()
        for error in moved
    )
    return first, second


def _shrunk(frames: torch.Tensor) -> torch.Tensor:
    shorter = min(frames.shape[-2:])
    if shorter <= FLOW_SIDE:
        return frames.float()
    size = [round(side * FLOW_SIDE / shorter) for side in frames.shape[-2:]]
    return functional.interpolate(frames.float(), size, mode="bilinear", antialias=True)


FPS_TOLERANCE = 1e-3  # relative; containers round rates such as 30000/1001
# Pixels scored at a time; a CPU is fastest when they fit its cache, a GPU when it is full.
BATCH_PIXELS = {"cpu": 100_000, "cuda": 8_000_000}
# Limit of the memory for scoring, both sides together; the largest tensors are the full-size features of LPIPS.
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

    Float arrays are not rounded to 8 bits. Files are decoded a few frames at a time, so a long video takes no more memory
    than a short one; LPIPS needs about 3 KB a pixel of one frame.

    Args:
        original, optimized: path, `Video`, `VideoFile`, array `[T, H, W, 3]` (uint8, or float in `[0, 1]`), or an
            object with `.video` and `.fps` such as a generation.
        metrics: names from `ALL_METRICS` (`CATALOGUE` explains each), or `"all"`: those that the
            clip is long enough for.
        backbone: LPIPS backbone; `"auto"` is the shift-tolerant one, which needs no download.
        device: `"auto"` takes the GPU when there is one.
        progress: show a progress bar.

    Raises:
        WanlabError: unreadable video, different length, size or frame rate (the message gives both values),
            unknown metric or backbone, backbone not on this machine, frames too small, a single frame
            where a metric needs two.
    """
    names = _metric_names(metrics)
    backbone = lpips.resolve(backbone)
    a, b = as_video(original, name="original"), as_video(optimized, name="optimized")
    same_geometry(a, b)
    names = _long_enough(names, a, everything=metrics == "all" or "all" in metrics)
    device = device_of(device)
    if "lpips" in names:
        lpips.load_backbone(backbone, device)  # a missing backbone is refused before the work begins
    batch = _batch(a, device, backbone if "lpips" in names else None)
    parts: dict[str, list[float]] = {}
    with (
        torch.inference_mode(),
        tqdm(total=a.length, desc="comparing", unit="frame", leave=False, disable=not progress) as bar,
    ):
        before, temporal = None, any(name in TEMPORAL for name in names)
        for pair in zip(a.batches(batch), b.batches(batch), strict=True):
            x, y = (to_tensor(frames, device) for frames in pair)
            scores = _score_frames(x, y, names, backbone)
            if temporal:  # these also need the last frame of the batch before
                pair = (x, y) if before is None else (torch.cat([before[0], x]), torch.cat([before[1], y]))
                scores |= _score_pairs(*pair, names) if len(pair[0]) > 1 else {}
                before = x[-1:].clone(), y[-1:].clone()
            for name, values in scores.items():
                # Numbers, not small tensors: those lie between the large ones, whose memory could not be used again.
                parts.setdefault(name, []).extend(values.tolist())
            bar.update(len(x))
    fps = a.fps if a.fps is not None else b.fps
    table = _joined(parts, names, backbone, f"{scales(a.height, a.width)} scales")
    notes = tuple(f"{video.path} {note}" for video in (a, b) for note in video.notes)
    return Scores(long_table(table), a.path, b.path, a.length, a.height, a.width, fps, notes)


def _score_frames(x: torch.Tensor, y: torch.Tensor, names: list[str], backbone: str) -> dict:
    score = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    values = {name: score[name](x, y) for name in names if name in score}
    if "lpips" in names:
        values["lpips"] = lpips.distances(x, y, backbone)
    return values


def _score_pairs(x: torch.Tensor, y: torch.Tensor, names: list[str]) -> dict:
    values = {}
    if "flicker" in names:
        values["flicker"] = flicker(x, y)
    if "motion_ratio" in names:
        values["motion of the original"], values["motion_ratio"] = motion(x), motion(y)
    if "warp_error" in names:
        own, error = warp_errors(x, y)
        values["warp_error"] = error - own
    return values


def _joined(parts: dict, names: list[str], backbone: str, scales: str) -> dict:
    whole = {name: np.asarray(values) for name, values in parts.items()}
    if "motion_ratio" in names:
        whole["motion_ratio"] = motion_ratio(whole["motion of the original"], whole["motion_ratio"])
    variant = {"lpips": backbone, "ms_ssim": scales}
    return {(name, variant.get(name, NO_BACKBONE)): whole[name] for name in names}


def _batch(video: VideoLike, device: torch.device, backbone: str | None) -> int:
    """Number of frames to score at a time: the fastest for the processor, limited on a GPU by its free memory."""
    pixels = BATCH_PIXELS["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # Memory that PyTorch has reserved and does not use is available too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        pixels = min(pixels, int(FREE_SHARE * free) // BYTES_PER_PIXEL.get(backbone, 600))
    return max(1, pixels // (video.height * video.width))


def _long_enough(names: list[str], video: VideoLike, *, everything: bool) -> list[str]:
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


def same_geometry(a: VideoLike, b: VideoLike) -> None:
    """Refuse two videos of different length, size or frame rate.

    Raises:
        WanlabError: they differ; the message gives both values and how to mend each.
    """
    differences, mends = [], []
    if a.length != b.length:
        differences.append(f"length ({a.length} and {b.length} frames)")
        mends.append(
            f"cut both to {min(a.length, b.length)} frames (ffmpeg -frames:v {min(a.length, b.length)})"
        )
    if (a.height, a.width) != (b.height, b.width):
        differences.append(f"size ({a.height}x{a.width} and {b.height}x{b.width})")
        turned = (a.height, a.width) == (b.width, b.height)
        mends.append(
            "turn one of them" if turned else f"scale one of them (ffmpeg -vf scale={a.width}:{a.height})"
        )
    if a.fps is not None and b.fps is not None and abs(a.fps - b.fps) > FPS_TOLERANCE * max(a.fps, b.fps):
        differences.append(f"frame rate ({a.fps:g} and {b.fps:g} fps)")
        mends.append(f"write both at one rate (ffmpeg -r {a.fps:g} before -i)")
    if differences:
        raise WanlabError(
            f"{a.path} and {b.path} differ in {', '.join(differences)}; "
            f"generate both with the same frames, height, width and fps, or {', '.join(mends)}"
        )


def device_of(device) -> torch.device:
    """A device by name; `"auto"` is the GPU where there is one.

    Raises:
        WanlabError: unknown name, or a GPU that PyTorch does not see.
    """
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
    scale = 255 if frames.dtype == np.uint8 else 1
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).to(device).float() / scale
    return tensor.permute(0, 3, 1, 2).contiguous()
