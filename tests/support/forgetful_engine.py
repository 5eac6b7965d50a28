"""PyTorch, which writes elsewhere when it is bound: an engine of one's own, named by tests in WANLAB_ENGINES."""

import torch

from wanlab.engines.registry import EngineKind, register
from wanlab.engines.torch import TorchEngine


class ForgetfulEngine(TorchEngine):
    """Computes, and leaves its outputs somewhere else: what a replayed graph of other memory does."""

    def bind(self, inputs, outputs, **settings):
        elsewhere = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
        return super().bind(inputs, elsewhere, **settings)


def open_forgetful(model, component, path):
    return ForgetfulEngine(model, component)


register(EngineKind("forgetful", "Writes elsewhere", "#654321", open=open_forgetful))
