"""The device a model works on."""

from __future__ import annotations

import sys


def synchronise(device=None) -> None:
    """Wait until the device has finished its work.

    With no device given, every CUDA device this process uses is waited for; nothing is imported
    or initialised for it.
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
