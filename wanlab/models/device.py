"""Synchronisation with the device that a model runs on."""

from __future__ import annotations

import sys


def synchronise(device=None) -> None:
    """Wait until the device has finished its work.

    With no device given, it waits for every CUDA device that this process uses; it imports and initialises
    nothing for it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
    elif torch.cuda.is_initialized():
        torch.cuda.synchronize()
