"""Perceptual distance (LPIPS) with named backbones whose weights are local and loaded once."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as functional

from wanlab.core.errors import WanlabError, did_you_mean, require
from wanlab.evaluate.lpips_kernel import distance_kernel

EPSILON = 1e-10  # as in normalize_tensor of both packages
TILE = 8192  # numbers of each side in one program of the kernel


def distance_map(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Distance between two layers' features at each pixel.

    Args:
        first, second: `[N, C, H, W]`, with equal memory layout.
        weight: `[C]`.

    Returns:
        float32 `[N, H, W]`: sum over channels of weight * (first / |first| - second / |second|)^2.
    """
    if first.is_cuda and find_spec("triton") and not _torch_version_is_hip():
        return _by_triton(first, second, weight)
    return by_torch(first, second, weight)


def by_torch(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`distance_map` in PyTorch."""
    lengths = [torch.linalg.vector_norm(side, dim=1, keepdim=True) + EPSILON for side in (first, second)]
    difference = (first / lengths[0]).sub_(second / lengths[1])
    return torch.einsum("nchw,c->nhw", difference.square_(), weight)


def _torch_version_is_hip() -> bool:
    return torch.version.hip is not None


def _by_triton(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if first.stride() != second.stride():
        second = torch.empty_like(first).copy_(second)
    if first.stride(2) != first.shape[3] * first.stride(3):  # the kernel indexes pixels with one stride
        first, second = first.contiguous(), second.contiguous()
    count, channels, height, width = first.shape
    out = torch.empty(count, height, width, device=first.device, dtype=torch.float32)
    wide = 1 << (channels - 1).bit_length()
    block = max(16, TILE // wide)
    grid = (-(-height * width // block), count)
    with torch.cuda.device(first.device) if first.is_cuda else torch.no_grad():
        _kernel()[grid](
            first,
            second,
            weight,
            out,
            height * width,
            first.stride(0),
            first.stride(1),
            first.stride(3),
            CHANNELS=channels,
            WIDE=wide,
            BLOCK=block,
            EPSILON=EPSILON,
        )
    return out


@lru_cache(maxsize=1)
def _kernel():
    return distance_kernel


DEFAULT_BACKBONE = "stlpips-alex"
# Backbone -> its file in torchvision's cache, and the torchvision function that downloads it.
HUB_FILES = {
    "lpips-alex": ("alexnet-owt-7be5be79.pth", "alexnet"),
    "lpips-vgg": ("vgg16-397923af.pth", "vgg16"),
    "lpips-squeeze": ("squeezenet1_1-b8a52dc0.pth", "squeezenet1_1"),
}
BACKBONES = (DEFAULT_BACKBONE, *HUB_FILES)
# Processors that compute these networks faster in channels-last layout (a CPU 1.5 to 2.5 times).
CHANNELS_LAST = {"cpu"}
MIN_SIZE = 32  # pixels per side; smaller frames vanish in the networks' pooling


@dataclass(frozen=True)
class Backbone:
    """A backbone, whether it can be used now, and what to do if it cannot."""

    name: str
    available: bool
    note: str


def available_backbones() -> list[Backbone]:
    """Every backbone and whether this machine can use it, without loading any."""
    backbones = []
    for name in BACKBONES:
        package, install = _package(name)
        if find_spec(package) is None:
            backbones.append(Backbone(name, False, f"pip install {install}"))
        elif name in HUB_FILES and not _hub_file(name).is_file():
            backbones.append(Backbone(name, False, _how_to_fetch(name)))
        else:
            backbones.append(Backbone(name, True, "weights are on this machine"))
    return backbones


def resolve(backbone: str) -> str:
    """The name of a backbone; `"auto"` becomes the default, an unknown name is refused.

    Raises:
        WanlabError: no such backbone.
    """
    if backbone == "auto":
        return DEFAULT_BACKBONE
    if backbone not in BACKBONES:
        raise WanlabError(
            f"unknown LPIPS backbone {backbone!r}{did_you_mean(backbone, BACKBONES)}; "
            f"known: {', '.join(BACKBONES)}"
        )
    return backbone


def load_backbone(backbone: str = "auto", device="cpu"):
    """The network of a backbone in evaluation mode; built once per process and device.

    Called with two batches `[N, 3, H, W]` in `[-1, 1]` it returns `[N, 1, 1, 1]`.

    Raises:
        WanlabError: unknown name, missing package, or missing or damaged backbone file.
    """
    name = resolve(backbone)
    if name not in HUB_FILES:
        return _build(name, str(device), "")
    path = _hub_file(name)
    if not path.is_file():
        raise WanlabError(
            f"LPIPS backbone {name} needs {path.name} in {path.parent}; {_how_to_fetch(name)}, "
            f"or use {DEFAULT_BACKBONE}"
        )
    return _build(name, str(device), str(path))


def distances(original, optimized, backbone: str = "auto"):
    """LPIPS of each frame of a batch.

    The features of both sides are computed in one batch, in float32 without TF32, so that a score does not depend
    on the graphics card; they equal those of the networks' own packages to 1e-5.

    Args:
        original, optimized: tensors `[N, 3, H, W]` in `[0, 1]` on one device.

    Returns:
        float64 tensor `[N]`; 0 for equal frames.

    Raises:
        WanlabError: as for `load_backbone`, or frames under 32 pixels per side.
    """
    with torch.inference_mode():
        total = sum(layer.double().mean((1, 2)) for layer in _layers(original, optimized, backbone))
        # Batched sums may round the two sides differently, but a perfect copy is perfect.
        return total.masked_fill((original == optimized).flatten(1).all(1), 0.0)


def distance_maps(original, optimized, backbone: str = "auto"):
    """LPIPS per pixel: the distance maps of the network's layers, resized to the frame and added.

    Equals `spatial=True` of the networks' packages; the mean of a map is near the frame's LPIPS, not equal to it.

    Args:
        original, optimized: as for `distances`.

    Returns:
        float32 tensor `[N, H, W]`.

    Raises:
        WanlabError: as for `distances`.
    """
    size = original.shape[-2:]
    with torch.inference_mode():
        return sum(
            functional.interpolate(layer[:, None], size, mode="bilinear", align_corners=False)[:, 0]
            for layer in _layers(original, optimized, backbone)
        )


def _layers(original, optimized, backbone: str):
    """Distance at each pixel of each layer of the network: float32 `[N, h, w]` each."""
    height, width = original.shape[-2:]
    if min(height, width) < MIN_SIZE:
        raise WanlabError(f"LPIPS needs frames of at least {MIN_SIZE}x{MIN_SIZE}; these are {height}x{width}")
    network, count = load_backbone(backbone, original.device), len(original)
    with exact_float32(original.device):
        frames = torch.cat([original, optimized]).float().mul_(2).sub_(1)
        frames = frames.contiguous(memory_format=_layout(original.device.type))
        layers = network.net(network.scaling_layer(frames))
        weights = [
            linear.model[-1].weight.flatten() for linear in network.lins
        ]  # 1x1 convolutions to one channel
        return [
            distance_map(features[:count], features[count:], weight)
            for features, weight in zip(layers, weights, strict=True)
        ]


def exact_float32(device):
    """A block without TF32 in convolutions on an NVIDIA GPU; TF32 would change scores in the fourth digit."""
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


def _package(name: str) -> tuple[str, str]:
    """Import name and pip name of the package that provides a backbone."""
    return ("lpips", "lpips") if name in HUB_FILES else ("stlpips_pytorch", "stlpips-pytorch")


def _hub_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILES[name][0]


def _how_to_fetch(name: str) -> str:
    maker = HUB_FILES[name][1]
    return (
        "fetch it once where there is a network with: "
        f"python -c \"import torchvision; torchvision.models.{maker}(weights='IMAGENET1K_V1')\""
    )


@lru_cache(maxsize=8)
def _build(name: str, device: str, path: str):
    package, install = _package(name)
    # Both packages print, and use arguments that torchvision has deprecated.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if path:
            module = require(package, install)
            try:
                network = module.LPIPS(net=name.removeprefix("lpips-"), verbose=False)
            except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
                raise WanlabError(
                    f"LPIPS backbone file {path} cannot be loaded; delete it and {_how_to_fetch(name)}"
                ) from error
        else:
            module = require(f"{package}.stlpips", install)
            network = module.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=_layout(device.partition(":")[0]))


def _layout(kind: str):
    return torch.channels_last if kind in CHANNELS_LAST else torch.contiguous_format
