"""Stops a generation at the first step whose latents are not finite, and names the tensor.

The check reads the smallest and the largest number of the latents after each step: one pass over a tensor that is a
thousandth of the work of a step, and one wait for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from wanlab.core.errors import WanlabError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; waits for its device."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


class StepCheck:
    """The callback of a diffusers pipeline that checks the latents after each step.

    Args:
        model: `wanlab.models.Model` that generates.
        steps: its denoising steps.
    """

    def __init__(self, model: Any, steps: int) -> None:
        self._model = model
        self._steps = steps

    def arguments(self, accepted: Collection[str]) -> dict[str, Any]:
        """Arguments of the pipeline's call that install the check.

        Args:
            accepted: names of the arguments that the pipeline takes.
        """
        known = getattr(self._model.pipeline, "_callback_tensor_inputs", ())
        tensors = [name for name in ("prompt_embeds", "negative_prompt_embeds", "latents") if name in known]
        if "latents" not in tensors or "callback_on_step_end_tensor_inputs" not in accepted:
            return {}
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": tensors}

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Raises WanlabError if the latents are not finite; changes nothing."""
        if is_finite(tensors["latents"]):
            return {}
        inputs = (name for name in tensors if name != "latents" and not _finite(tensors[name]))
        first = next(self._weights(), None) or next(inputs, None)
        component = self._model.schedule(self._steps)["component"][step]
        what = f"{first}, so the latents are not finite either" if first else "the latents"
        raise WanlabError(
            f"{self._model.spec.name}: NaN or infinity in {what} after step {step + 1} of {self._steps} ({component});"
            f" mend the weights, or load the model in another dtype than {str(self._model.dtype).removeprefix('torch.')}"
        )

    def _weights(self) -> Iterator[str]:
        """Weights that are not finite, in the order in which a generation uses them."""
        for component, network in self._model.components.items():
            if isinstance(network, torch.nn.Module):
                for name, tensor in network.state_dict().items():
                    if not _finite(tensor):
                        yield f"weight {name} of {component}"


def _finite(tensor: Any) -> bool:
    return not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOATS or is_finite(tensor)


def check_video(video: np.ndarray, name: str) -> None:
    """Refuse a video that is not finite though its latents were.

    Raises:
        WanlabError: a number is NaN or infinite.
    """
    if video.size and not (np.isfinite(video.min()) and np.isfinite(video.max())):
        raise WanlabError(
            f"{name}: NaN or infinity in the video, which vae_decoder made of finite latents; load the model in another"
            " dtype"
        )
