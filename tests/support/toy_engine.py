"""PyTorch, whose output is negated twice: an engine of one's own, named by tests in WANLAB_ENGINES and imported by none."""

from wanlab.engines.registry import EngineKind, register
from wanlab.engines.torch import TorchEngine


class NegatedEngine(TorchEngine):
    def __init__(self, model, component):
        super().__init__(model, component)
        self.name, forward = "negated", self._call
        self._call = lambda *inputs: -(-1 * forward(*inputs))


def open_negated(model, component, path):
    return NegatedEngine(model, component)


register(EngineKind("negated", "Negated twice", "#123456", open=open_negated))
