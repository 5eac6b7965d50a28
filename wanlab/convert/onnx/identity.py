"""Hashes that say when a converted file is still true."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "diffusers", "transformers")


def trace_key(plan, settings: dict[str, Any]) -> str:
    """Hash of what a traced graph depends on besides the weights.

    Class, configuration and dtype of the network, which half of it, tracing settings, package versions.
    """
    from wanlab import __version__

    network = plan.network
    config = network.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {
        name: value for name, value in config.items() if not name.startswith("_")
    }  # where it was loaded from
    facts = {
        "class": type(network).__qualname__,
        "inputs": plan.inputs,
        "output": plan.output,
        "config": config,
        "dtypes": sorted({str(tensor.dtype) for tensor in network.state_dict().values()}),
        "settings": settings,
        "versions": {"wanlab": __version__} | {name: _version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def component_key(plan, tracing: str, settings: dict[str, Any]) -> str:
    """Hash of a trace, the weights that fill it, and what is done to the graph afterwards."""
    import torch

    digest = hashlib.sha256(json.dumps([plan.component, tracing, settings], sort_keys=True).encode())
    for name, tensor in plan.network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
