"""Muon: matrices are stepped along the nearest orthogonal matrix of their averaged gradient (Jordan et al. 2024, "Muon: an
optimizer for hidden layers in neural networks"; learning rates as AdamW's by Liu et al. 2025, "Muon is scalable for LLM
training").

It does what `torch.optim.Muon` does with `adjust_lr_fn="match_rms_adamw"`, for all matrices of a shape at once: one by one,
the launches of its hundred small products would take as long as a step of the experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

QUINTIC = (3.4445, -4.775, 2.0315)
"""Coefficients of the Newton-Schulz iteration; they pull singular values near one in few iterations."""
ITERATIONS = 5


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrices of `[N, rows, columns]`, singular values within 0.3 of one, in bfloat16."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Optimiser of matrices.

    Args:
        parameters: matrices, two dimensions each.
        lr: learning rate, on AdamW's scale.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._step(parameters, group, 0.2 * max(shape) ** 0.5)

    def _step(self, parameters: list[torch.nn.Parameter], group: dict, scale: float) -> None:
        momentum, lr = group["momentum"], group["lr"]
        gradients = [parameter.grad for parameter in parameters]
        averages = [
            self.state[parameter].setdefault("average", torch.zeros_like(parameter))
            for parameter in parameters
        ]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov
        steps = orthogonal(torch.stack(ahead)).to(parameters[0].dtype).unbind()
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-lr * scale)
