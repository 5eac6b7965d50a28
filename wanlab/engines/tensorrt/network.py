"""Converts an ONNX graph with settings into a serialised TensorRT engine; errors name the layer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_bytes
from wanlab.engines.tensorrt.profile import PixelProfile, Range, Shapes, Source, network_shapes, read_source
from wanlab.engines.tensorrt.runtime import SEVERE, Message, Runtime, open_runtime, plain

if TYPE_CHECKING:
    import tensorrt as trt


@contextmanager
def monitor(runtime: Runtime, label: str, progress: bool) -> Iterator[Any]:
    """An `IProgressMonitor` that moves a bar along the outermost phase of a build; None without progress."""
    if not progress or not hasattr(runtime.module, "IProgressMonitor"):
        yield None
        return
    base: Any = runtime.module.IProgressMonitor
    with tqdm(desc=label, unit="step", leave=False) as bar:

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)
                self.outermost = ""

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                if not parent_phase:
                    self.outermost = phase_name
                    bar.reset(total=num_steps)
                bar.set_postfix_str(phase_name, refresh=False)

            def step_complete(self, phase_name: str, step: int) -> bool:
                if phase_name == self.outermost:
                    bar.update(step + 1 - bar.n)
                return True

            def phase_finish(self, phase_name: str) -> None:
                if phase_name == self.outermost:
                    bar.update((bar.total or bar.n) - bar.n)

        yield Monitor()


_QUOTED = re.compile(r"operation '([^']+)'")
_UNNAMED = re.compile(r"\b(\w+) operation was not supported")
# Operator that TensorRT was seen to refuse -> another way to express it.
MENDS = {"Attention": "export with opset=20, which expresses it in plain operators"}


@dataclass(frozen=True)
class Refusal:
    """Reason why TensorRT refused a graph.

    Attributes:
        node: name of a node of the graph, `module path/node`; empty if TensorRT names none.
        operator: ONNX operator of the node.
        reason: message of TensorRT.
    """

    node: str
    operator: str
    reason: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities in the reason, `"7.5"` for SM75; often none."""
        return tuple(f"{name[:-1]}.{name[-1]}" for name in re.findall(r"(?i)\bsm_?(\d{2,3})\b", self.reason))

    def __str__(self) -> str:
        place = f"{self.node} ({self.operator}): " if self.node else ""
        mend = f"; {MENDS[self.operator]}" if self.operator in MENDS else ""
        return f"{place}{self.reason}{mend}"


@dataclass(frozen=True, eq=False)
class Network:
    """A parsed graph; the network needs its builder and parser."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser


def parse(runtime: Runtime, source: Source, log: Sequence[Message]) -> Network:
    """Parse an ONNX graph into a strongly typed network; weights beside the file are found by its path.

    Args:
        log: messages of the runtime during this call.

    Raises:
        WanlabError: a node that the parser refuses, with its name, operator and the parser's reason.
    """
    module = runtime.module
    builder: trt.Builder | None = module.Builder(runtime.logger)
    if not builder:
        raise WanlabError(f"{runtime.name} cannot build here: {runtime.last_error(log) or 'no GPU is seen'}")
    # From TensorRT 11 on every network is strongly typed; before, it is a flag.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network: trt.INetworkDefinition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: trt.OnnxParser = module.OnnxParser(network, runtime.logger)
    if not parser.parse_from_file(str(source.path)):
        faults = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        first = faults[0] if faults else Refusal("", "", runtime.last_error(log) or "no reason given")
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WanlabError(f"{runtime.name} cannot read {source.path.name}: {first}{more}")
    allow_decomposition(runtime, network)
    return Network(builder, network, parser)


def allow_decomposition(runtime: Runtime, network: trt.INetworkDefinition) -> None:
    """Allow attention without a fused kernel to be computed as products and softmax, where TensorRT supports that.

    The parser does not allow it, and TensorRT then refuses attention without a fused kernel: ONNX's Attention in float32.
    """
    module: Any = runtime.module  # not in the stubs
    if not hasattr(module, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = module.IAttentionInputLayer  # the bindings return every layer as an ILayer
            layer.attention.decomposable = True


def _parser_error(error: trt.ParserError) -> Refusal:
    reason = " ".join(error.desc().split())
    return Refusal(error.node_name(), error.node_operator(), reason)


def refusal(log: Sequence[Message], operators: Mapping[str, str]) -> Refusal:
    """Node and reason of the first error of a failed build.

    Args:
        log: messages of the build.
        operators: node of the graph -> its operator.
    """
    text = next((text for severity, text in log if severity in SEVERE), "no reason given")
    quoted = _QUOTED.search(text)
    names = [quoted[1]] if quoted else []
    node = next((name for name in names if name in operators), "") or max(
        (name for name in operators if name and name in text), key=len, default=""
    )
    if not node and (
        unnamed := _UNNAMED.search(text)
    ):  # the message has only the operator: take its first node
        node = next((name for name, operator in operators.items() if operator == unnamed[1]), "")
    # `Refusal` has the name already.
    reason = plain(text).replace(f"operation '{node}' ", "") if node else plain(text)
    return Refusal(node, operators.get(node, ""), reason)


GIB = 2**30
CAPABILITIES = ("8.6", "8.9", "12.0")  # Ampere, Ada and Blackwell of the RTX line


def target_gpus(runtime: Runtime, capabilities: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Compute capabilities to build for, and the name of the GPU if the engine is for the one of this machine.

    Raises:
        WanlabError: a capability that the runtime does not know, or a list for TensorRT, which has no choice.
    """
    if runtime.builds_ahead:
        known = {
            f"{name[2:-1]}.{name[-1]}": name
            for name in runtime.module.ComputeCapability.__members__
            if name.startswith("SM")
        }
        targets = tuple(dict.fromkeys(CAPABILITIES if capabilities is None else capabilities))
        for target in targets:
            if target not in known:
                raise WanlabError(
                    f"{runtime.name} builds for no compute capability {target!r}{did_you_mean(str(target), known)}; it"
                    f" knows {', '.join(known)}"
                )
        if not targets:
            raise WanlabError(f"no compute capability to build for; give some of {', '.join(known)}")
        return targets, ""
    if not torch.cuda.is_available():
        raise WanlabError(
            f"{runtime.name} builds on the GPU that will run the engine and PyTorch sees none; build ahead of time"
            " with kind='tensorrt-rtx'"
        )
    major, minor = torch.cuda.get_device_capability()
    if capabilities is not None and tuple(capabilities) != (f"{major}.{minor}",):
        raise WanlabError(
            f"{runtime.name} builds for the GPU of this machine; leave compute_capabilities out"
        )
    return (f"{major}.{minor}",), torch.cuda.get_device_name()


class Refused(WanlabError):
    """The builder refused a graph; `refusal` has the reason."""

    def __init__(self, text: str, refusal: Refusal) -> None:
        super().__init__(text)
        self.refusal = refusal


def make_plan(
    runtime: Runtime,
    source: Source,
    shapes: Shapes,
    targets: tuple[str, ...],
    settings: Mapping[str, Any],
    timing_cache: str | os.PathLike[str] | None,
    log: list[Message],
    progress: bool,
) -> trt.IHostMemory:
    """The serialised engine.

    Args:
        log: messages of the runtime during this call, with the builder's details.

    Raises:
        WanlabError: the parser refuses the graph. Refused: the builder does.
    """
    parsed = parse(runtime, source, log)
    config = _config(runtime, parsed.builder, shapes, targets, settings)
    cache = _load_timings(config, timing_cache, log)
    with monitor(runtime, f"build {source.path.stem}", progress) as bar:
        if bar is not None:
            config.progress_monitor = bar
        plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        reason = refusal(log, source.operators)
        raise Refused(
            f"{runtime.name} cannot build {source.path.name} for compute capability {', '.join(targets)}: {reason}",
            reason,
        )
    if cache is not None:
        timings: Any = config.get_timing_cache().serialize()  # a buffer, other than in its stub
        write_bytes(cache, timings)
    return plan


def _config(
    runtime: Runtime,
    builder: trt.Builder,
    shapes: Shapes,
    targets: tuple[str, ...],
    settings: Mapping[str, Any],
) -> trt.IBuilderConfig:
    module = runtime.module
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # layers keep their names
    if settings["level"] is not None:
        config.builder_optimization_level = settings["level"]
    if settings["workspace_gib"] is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, int(settings["workspace_gib"] * GIB))
    if not settings["tf32"]:
        config.clear_flag(module.BuilderFlag.TF32)
    if runtime.builds_ahead:
        rtx: Any = config  # not in the stubs of TensorRT 10
        rtx.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(module.ComputeCapability, f"SM{target.replace('.', '')}")
            rtx.set_compute_capability(capability, index)
    if shapes.free:
        optimization = builder.create_optimization_profile()
        for name, ends in shapes.inputs.items():
            low, best, high = (module.Dims(shape) for shape in ends)
            optimization.set_shape(name, low, best, high)
        if config.add_optimization_profile(optimization) < 0:
            raise WanlabError(f"{runtime.name} refuses the profile {shapes.inputs}")
    return config


def _load_timings(
    config: trt.IBuilderConfig, file: str | os.PathLike[str] | None, log: list[Message]
) -> Path | None:
    if file is None:
        return None
    path = Path(file)
    known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        log.append(("WARNING", f"{path} has timings of another GPU or version; it is replaced"))
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return path


def buildable(
    onnx_path: str | os.PathLike[str],
    capabilities: Sequence[str] = ("7.5", "8.0", *CAPABILITIES, "12.1"),
    *,
    profile: PixelProfile | Mapping[str, Range] | None = None,
    level: int | None = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Find the GPUs for which TensorRT for RTX can build a graph; nothing is written or run.

    Args:
        onnx_path: ONNX file.
        capabilities: compute capabilities; one build for each.
        profile, level: as in `build_tensorrt`.

    Returns:
        A row per capability: capability, built (bool), time_ms, size_bytes (of the engine), node, operator, reason
        (of the first refused node; empty when it was built).

    Raises:
        WanlabError: as `build_tensorrt`, except when the builder refuses the graph.
    """
    runtime, source = open_runtime("tensorrt-rtx"), read_source(onnx_path)
    shapes = network_shapes(source, profile)
    settings: dict[str, Any] = {"level": level, "workspace_gib": None, "tf32": True}
    rows = []
    for target in target_gpus(runtime, capabilities)[0]:
        begin = time.perf_counter()
        row: dict[str, Any] = {"capability": target, "built": True}
        with runtime.messages() as log:
            try:
                plan = make_plan(runtime, source, shapes, (target,), settings, None, log, progress)
                row |= {"size_bytes": memoryview(plan).nbytes, "node": "", "operator": "", "reason": ""}
            except Refused as error:
                row |= {"built": False, "size_bytes": None, "node": error.refusal.node}
                row |= {"operator": error.refusal.operator, "reason": error.refusal.reason}
        rows.append(row | {"time_ms": (time.perf_counter() - begin) * 1e3})
    columns = ["capability", "built", "time_ms", "size_bytes", "node", "operator", "reason"]
    return pd.DataFrame(rows, columns=columns)
