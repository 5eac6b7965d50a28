"""An ONNX graph as a TensorRT network, and what TensorRT has against it, by the names of wanlab's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.runtime import SEVERE, Message, Runtime, plain
from wanlab.convert.tensorrt.source import Source
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import tensorrt as trt

_QUOTED = re.compile(r"operation '([^']+)'")
_UNNAMED = re.compile(r"\b(\w+) operation was not supported")
# What was seen refused, and another way to say the same.
MENDS = {"Attention": "export with opset=20, which says it in plain operators"}


@dataclass(frozen=True)
class Refusal:
    """Why TensorRT did not take a graph.

    Attributes:
        node: of the graph, `module path/node`; empty where TensorRT names none. operator: of ONNX.
        reason: in TensorRT's words.
    """

    node: str
    operator: str
    reason: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that the reason names, `"7.5"` for SM75; often none."""
        return tuple(f"{name[:-1]}.{name[-1]}" for name in re.findall(r"(?i)\bsm_?(\d{2,3})\b", self.reason))

    def __str__(self) -> str:
        at = f"{self.node} ({self.operator}): " if self.node else ""
        mend = f"; {MENDS[self.operator]}" if self.operator in MENDS else ""
        return f"{at}{self.reason}{mend}"


@dataclass(frozen=True, eq=False)
class Network:
    """A parsed graph; builder and parser live as long as the network."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser


def parse(runtime: Runtime, source: Source, log: Sequence[Message]) -> Network:
    """Parse an ONNX graph into a strongly typed network; weights beside the file are found by its path.

    Args:
        log: that the runtime's messages go to meanwhile.

    Raises:
        WanlabError: a node that the parser cannot take, with its name, operator and the parser's reason.
    """
    module = runtime.module
    builder: trt.Builder | None = module.Builder(runtime.logger)
    if not builder:
        raise WanlabError(f"{runtime.name} cannot build here: {runtime.last_error(log) or 'no GPU is seen'}")
    # The only kind there is from TensorRT 11 on; before, a flag.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network: trt.INetworkDefinition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: trt.OnnxParser = module.OnnxParser(network, runtime.logger)
    if not parser.parse_from_file(str(source.path)):
        faults = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        first = faults[0] if faults else Refusal("", "", runtime.last_error(log) or "no reason given")
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WanlabError(f"{runtime.name} cannot read {source.path.name}: {first}{more}")
    let_decompose(runtime, network)
    return Network(builder, network, parser)


def let_decompose(runtime: Runtime, network: trt.INetworkDefinition) -> None:
    """Let attention that no kernel computes whole be computed as products and softmax, where TensorRT can.

    The parser leaves that off, and TensorRT refuses then what it has no such kernel for: ONNX's Attention in float32.
    """
    module: Any = runtime.module  # newer than the stubs
    if not hasattr(module, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = module.IAttentionInputLayer  # the bindings give every layer as an ILayer
            layer.attention.decomposable = True


def _parser_error(error: trt.ParserError) -> Refusal:
    reason = " ".join(error.desc().split())
    return Refusal(error.node_name(), error.node_operator(), reason)


def refusal(log: Sequence[Message], operators: Mapping[str, str]) -> Refusal:
    """What the first error of a failed build says.

    Args:
        operators: node -> operator, of the graph.
    """
    text = next((text for severity, text in log if severity in SEVERE), "no reason given")
    quoted = _QUOTED.search(text)
    names = [quoted[1]] if quoted else []
    node = next((name for name in names if name in operators), "") or max(
        (name for name in operators if name and name in text), key=len, default=""
    )
    if not node and (unnamed := _UNNAMED.search(text)):  # only its kind is said: the first of that
        node = next((name for name, operator in operators.items() if operator == unnamed[1]), "")
    # The name is said already.
    reason = plain(text).replace(f"operation '{node}' ", "") if node else plain(text)
    return Refusal(node, operators.get(node, ""), reason)
