"""A module around another one, in its place."""

from __future__ import annotations

from typing import Any

import torch


class Around(torch.nn.Module):
    """Stands in the place of a module, `inner`; attributes that it has not itself are those of `inner`."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)
