"""An ONNX graph and settings as a serialised engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.network import Refusal, parse, refusal
from wanlab.convert.tensorrt.profile import Shapes
from wanlab.convert.tensorrt.progress import monitor
from wanlab.convert.tensorrt.runtime import Message, Runtime
from wanlab.convert.tensorrt.source import Source
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import tensorrt as trt

GIB = 2**30
CAPABILITIES = ("8.6", "8.9", "12.0")  # Ampere, Ada and Blackwell of the RTX line


def target_gpus(runtime: Runtime, capabilities: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Compute capabilities to build for, and the GPU's name where the engine is for this machine's.

    Raises:
        WanlabError: a capability that the runtime does not know, or a list where there is no choice.
    """
    if runtime.builds_ahead:
        known = {
            f"{name[2:-1]}.{name[-1]}": name
            for name in runtime.module.ComputeCapability.__members__
            if name.startswith("SM")
        }
        wanted = tuple(dict.fromkeys(CAPABILITIES if capabilities is None else capabilities))
        for one in wanted:
            if one not in known:
                raise WanlabError(
                    f"{runtime.name} builds for no compute capability {one!r}{did_you_mean(str(one), known)}; it"
                    f" knows {', '.join(known)}"
                )
        if not wanted:
            raise WanlabError(f"no compute capability to build for; give some of {', '.join(known)}")
        return wanted, ""
    import torch

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
    """The builder made no engine; `refusal` says why."""

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
        log: that the runtime's messages go to meanwhile; the builder's details among them.

    Raises:
        WanlabError: the parser refuses the graph. Refused: the builder does.
    """
    parsed = parse(runtime, source, log)
    config = _config(runtime, parsed.builder, shapes, targets, settings)
    cache = _load_timings(config, timing_cache, log)
    with monitor(runtime, f"build {source.path.stem}", progress) as watching:
        if watching is not None:
            config.progress_monitor = watching
        plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        found = refusal(log, source.operators)
        raise Refused(
            f"{runtime.name} cannot build {source.path.name} for compute capability {', '.join(targets)}: {found}",
            found,
        )
    if cache is not None:
        draft = Path(f"{cache}.{os.getpid()}")
        draft.write_bytes(config.get_timing_cache().serialize())
        os.replace(draft, cache)
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
        rtx: Any = config  # not in the stubs, which are of TensorRT 10
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
        log.append(("WARNING", f"{path} holds timings of another GPU or version; it is written anew"))
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return path
