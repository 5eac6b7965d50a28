"""Digests that tell whether an exported file still belongs to its network and settings."""

from __future__ import annotations

import functools
import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch

from wanlab import __version__
from wanlab.core.contents import content_digest
from wanlab.core.files import digest as digest_of
from wanlab.core.paths import source_digest

PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "diffusers", "transformers")


def trace_facts(spec: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything besides the weights that a traced graph depends on.

    These are the class and configuration of the network, the classes of its parts and of its attention processors, the
    part of it that is traced, the tracing settings, and the versions of the packages and of wanlab's exporter.
    """
    network = spec.network
    parts = [
        name for part in network.modules() for name in (_name(part), _name(getattr(part, "processor", None)))
    ]
    config = network.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # The folder and dtype of loading are left out: the dtype of the graph is a setting of its own.
    config = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in ("dtype", "torch_dtype")
    }
    return {
        "class": _name(network),
        "parts": digest_of(parts, 16),
        "inputs": spec.inputs,
        "output": spec.output,
        "config": config,
        "settings": settings,
        "versions": {"wanlab": __version__, "exporter": _exporter()}
        | {name: _version(name) for name in PACKAGES},
    }


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


@functools.cache
def _exporter() -> str:
    """Digest of the modules that decide what a graph looks like: an edited exporter makes its files out of date."""
    return source_digest("export", "models")


def weights_key(network: torch.nn.Module) -> str:
    """Hash of the weights of a network: names, shapes, dtypes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def graph_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of an ONNX file and of its weights in other files, which may hold those of other graphs too.

    Raises:
        OSError: a file is missing.
        DecodeError: it is no ONNX file.
    """
    path = Path(path)
    graph = onnx.load(path, load_external_data=False).graph
    places: dict[str, set[tuple[int, int]]] = {}
    for tensor in graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if "location" in entry:
            start = int(entry.get("offset", 0))
            length = int(entry.get("length", 0)) or (path.parent / entry["location"]).stat().st_size - start
            places.setdefault(entry["location"], set()).add((start, length))
    digest = hashlib.sha256(content_digest(path).encode())
    for place, ranges in sorted(places.items()):
        digest.update(f"{place} {content_digest(path.parent / place, sorted(ranges))}".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
