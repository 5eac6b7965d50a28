"""Tensors on disk under the hash of their content: each content is kept once, and checked when it is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch


def keep(folder: Path, tensor: torch.Tensor) -> str:
    """Write a tensor under the hash of its content, once."""
    import torch
    from safetensors.torch import save_file

    # A clone, as `contiguous` keeps the strides of a broadcast axis of size 1.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    content = _digest(tensor)
    path = tensor_file(folder, content)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.safetensors")
        save_file({"tensor": tensor}, temporary)
        os.replace(temporary, path)
    return content


def _digest(tensor: torch.Tensor) -> str:
    """Hash of dtype, shape and every byte of a contiguous tensor on the CPU."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read(folder: Path, content: str) -> torch.Tensor:
    """The tensor of this content, on the CPU.

    Raises:
        WanlabError: its file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensor = load_file(tensor_file(folder, content))["tensor"]
        if _digest(tensor) != content:
            raise ValueError("its content was changed")
        return tensor
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WanlabError(
            f"{tensor_file(folder, content)} of the recording is missing or broken ({reason}); record it again"
        ) from error


def tensor_file(folder: Path, content: str) -> Path:
    """Where the tensor of this content lies."""
    return folder / f"{content[:32]}.safetensors"
