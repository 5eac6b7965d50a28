"""Table of all kinds of engines: names, how an engine is prepared and opened, required packages, colours.

Notebooks, `wanlab bench`, `wanlab doctor`, configurations, plots and tables read it. Reading the table imports no engine;
the functions of an engine are given as text and imported when they are first called.

An engine of your own is one Python file that ends in `register(EngineKind(...))`. If the environment variable
`WANLAB_ENGINES` names the file (several are separated by commas), every command, notebook and child process knows it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.plugins import run_files
from wanlab.models.spec import EXPERTS

if TYPE_CHECKING:
    from wanlab.engines.base import Engine
    from wanlab.models.pipeline import Model

VARIABLE = "WANLAB_ENGINES"
EAGER = "eager"
"""The engine of a model as it was loaded; other engines are compared with it."""
HALVES_OF_VAE = ("vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class Need:
    """A package that an engine needs.

    Attributes:
        name: name for readers.
        modules: names of modules, one of which has to be importable.
        install: command that installs it.
        package: name of the distribution whose version `wanlab doctor` shows.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    package: str = ""

    def here(self) -> bool:
        """Whether the package can be imported. Type stubs alone, a package without code, do not count."""
        specs = (importlib.util.find_spec(module) for module in self.modules)
        return any(spec is not None and spec.origin is not None for spec in specs)


@dataclass(frozen=True)
class EngineKind:
    """One kind of engine.

    A function is given directly, or as `Deferred("module:function")`, which imports it at the first call.

    Attributes:
        name: name in parameters, files and tables, e.g. `"onnxruntime"`.
        title: name for readers.
        colour: colour in every plot.
        open: `open(model, component, path, **settings) -> Engine`. A kind with `suffixes` also opens files without a model:
            `model` and `component` are None then.
        prepare: `prepare(model, component, folder, *, size, progress, **settings) -> path` writes the file for `open`, or
            reuses the file of an earlier call if it is current. Without it nothing is written, except that the component
            is exported for kinds that open ONNX graphs or have `build`.
        build: `build(graph, *, device, progress, **settings) -> path`, for kinds that are built from an ONNX graph of fixed
            sizes for `"cpu"` or `"cuda"`. Their `prepare` exports the component and then calls `build`.
        suffixes: suffixes of the files that it opens.
        needs: packages that it needs to run.
        components: components that it can run; None is all.
        usual: components that run on it where it is chosen for the whole model; None is all that it can run.
        plans: how precision plans are applied: `"torch"` in PyTorch, `"graph"` as QuantizeLinear and DequantizeLinear
            in the ONNX graph, `""` not at all.
        labels: name of an engine of this kind -> where it computes: `"cpu"`, `"cuda"`, or `""` for the model's device.
        titles: label -> title, for labels that have a title of their own.
        build_settings, open_settings: settings of `prepare` and `build`, and of `open` -> a line of help.
        setting_types: setting -> type of its value, as msgspec reads it; settings without one are not checked.
        by_default: whether tables include it where no engine is chosen; False where preparing it takes minutes.
        describe: `describe() -> {title: text}` for `wanlab doctor`; None shows the versions of `needs`.
        required: whether wanlab's own notebooks need it on every machine.
    """

    name: str
    title: str
    colour: str
    open: Callable[..., Engine]
    prepare: Callable[..., Path | None] | None = None
    build: Callable[..., Path] | None = None
    suffixes: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    components: tuple[str, ...] | None = None
    usual: tuple[str, ...] | None = None
    plans: Literal["torch", "graph", ""] = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    build_settings: Mapping[str, str] = field(default_factory=dict)
    open_settings: Mapping[str, str] = field(default_factory=dict)
    setting_types: Mapping[str, Any] = field(default_factory=dict)
    by_default: bool = True
    describe: Callable[[], Mapping[str, str]] | None = None
    required: bool = False

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", {self.name: ""})
        if self.prepare is None and (self.build is not None or ".onnx" in self.suffixes):
            object.__setattr__(self, "prepare", _FromGraph(self.build))

    @property
    def settings(self) -> dict[str, str]:
        """Setting -> a line of help."""
        return {**self.build_settings, **self.open_settings}

    def missing(self) -> str:
        """The missing packages and how to install them, in one line; empty if none is missing."""
        lacking = [need for need in self.needs if not need.here()]
        return "; ".join(f"{need.name} is not installed; add it with: {need.install}" for need in lacking)

    def runs(self, component: str) -> bool:
        """Whether it can run a component."""
        return self.components is None or component in self.components

    def runs_usually(self, component: str) -> bool:
        """Whether a component runs on it where it is chosen for the whole model."""
        return self.runs(component) if self.usual is None else component in self.usual

    def check(self, component: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """Refuse a component or settings that it does not support, before any work is done.

        Raises:
            WanlabError: a package is missing, it does not run this component, has no such setting, or a setting cannot have
                this value.
        """
        if missing := self.missing():
            raise WanlabError(missing)
        if component is not None and not self.runs(component):
            raise WanlabError(f"{self.name} runs {' and '.join(self.components)}, not {component}")
        for name, value in (settings or {}).items():
            if name not in self.settings:
                known = f"it has {', '.join(self.settings)}" if self.settings else "it has none"
                raise WanlabError(
                    f"{self.name} has no setting {name!r}{did_you_mean(name, self.settings)}; {known}"
                )
            if value is not None and (fault := self.setting_fault(name, value)):
                raise WanlabError(fault)

    def setting_fault(self, name: str, value: Any) -> str:
        """What is wrong with the value of a setting, in words; empty if nothing is."""
        try:
            msgspec.convert(value, self.setting_types.get(name, Any))
        except msgspec.ValidationError as error:
            return f"{name} of {self.name} is {value!r} ({first_line(error)}); it says: {self.settings[name]}"
        return ""

    def opening(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `open` accepts, out of the given ones."""
        return {name: value for name, value in settings.items() if name in self.open_settings}

    def building(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `prepare` and `build` accept, out of the given ones."""
        return {name: value for name, value in settings.items() if name in self.build_settings}

    def label(self, device: str) -> str:
        """The name of an engine of this kind that computes on `"cpu"` or `"cuda"`."""
        names = [label for label, place in self.labels.items() if place == device]
        return names[0] if names else next(iter(self.labels))


class Deferred:
    """A function given as `"module:function"`, imported at the first call."""

    def __init__(self, place: str) -> None:
        self.module, _, self.name = place.partition(":")

    def __repr__(self) -> str:
        return f"{self.module}:{self.name}"

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(self.module), self.name)(*arguments, **settings)


@dataclass(frozen=True)
class _FromGraph:
    """The `prepare` of kinds that open an ONNX graph, or a file that is built from one."""

    build: Callable[..., Path] | None

    def __call__(
        self,
        model: Model,
        component: str,
        folder: str | os.PathLike,
        *,
        size: Mapping[str, int | None],
        progress: bool = False,
        **settings: Any,
    ) -> Path:
        from wanlab.export.export import export  # loads diffusers

        graph = Path(folder) / f"{component}.onnx"
        sizes: dict[str, Any] = dict(size)
        export(model, component, graph, dynamic=False, **sizes)
        if self.build is None:
            return graph
        return Path(self.build(graph, device=model.device.type, progress=progress, **settings))


TORCH = Need("PyTorch", ("torch",), "pip install torch", "torch")
ORT_PACKAGE = "onnxruntime-gpu" if sys.platform == "linux" else "onnxruntime"
ONNXRUNTIME = Need("ONNX Runtime", ("onnxruntime",), f"pip install {ORT_PACKAGE}", ORT_PACKAGE)
ONNXRUNTIME_SETTINGS = {
    "provider": "auto, cpu or cuda",
    "threads": "threads of the CPU; PyTorch's own number if not given",
    "optimization": "optimisation of the graph: disabled, basic, extended or all",
    "cuda_graph": "capture the work of the GPU once and replay it",
    "allow_cpu_fallback": "let nodes that compute run on the CPU in a CUDA session",
}

Threads = Annotated[int, msgspec.Meta(ge=1, le=4096)]
ONNXRUNTIME_TYPES = {
    "provider": Literal["auto", "cpu", "cuda"],
    "threads": Threads,
    "optimization": Literal["disabled", "basic", "extended", "all"],
    "cuda_graph": bool,
    "allow_cpu_fallback": bool,
}

ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind(
            EAGER,
            "PyTorch, eager",
            "#8a93a0",
            open=Deferred("wanlab.engines.torch:open_eager"),
            needs=(TORCH,),
            plans="torch",
            required=True,
        ),
        EngineKind(
            "compiled",
            "PyTorch, compiled",
            "#5b8c5a",
            open=Deferred("wanlab.engines.torch:open_compiled"),
            needs=(TORCH,),
            usual=EXPERTS,
            plans="torch",
            by_default=False,
        ),
        EngineKind(
            "onnxruntime",
            "ONNX Runtime",
            "#3d85c6",
            open=Deferred("wanlab.engines.onnxruntime:open_onnxruntime"),
            suffixes=(".onnx",),
            needs=(ONNXRUNTIME,),
            plans="graph",
            labels={"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"},
            open_settings=ONNXRUNTIME_SETTINGS,
            setting_types=ONNXRUNTIME_TYPES,
            describe=Deferred("wanlab.engines.onnxruntime:describe"),
            required=True,
        ),
        EngineKind(
            "tensorrt",
            "TensorRT",
            "#6fa832",
            open=Deferred("wanlab.engines.tensorrt.engine:open_tensorrt"),
            build=Deferred("wanlab.engines.tensorrt.build:build_graph"),
            suffixes=(".engine", ".plan"),
            needs=(
                Need(
                    "TensorRT",
                    ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"),
                    'pip install "wanlab[rtx]" (builds on any machine), or "wanlab[gpu]"',
                ),
            ),
            plans="graph",
            labels={"tensorrt": "cuda", "tensorrt-rtx": "cuda"},
            titles={"tensorrt-rtx": "TensorRT for RTX"},
            build_settings={
                "level": "builder optimisation level, 0 to 5",
                "workspace_gib": "most GPU memory for the scratch of a layer, in GiB",
                "tf32": "let float32 products use TF32",
                "timing_cache": "file of kernel timings, which is read and added to",
            },
            open_settings={
                "runtime_cache": "file of kernels that TensorRT for RTX compiled for this GPU",
                "specialization": "specialisation of kernels to shapes in TensorRT for RTX: lazy, eager or none",
                "device_cuda_graphs": "let TensorRT for RTX capture its own CUDA graphs",
            },
            setting_types={
                "level": Annotated[int, msgspec.Meta(ge=0, le=5)],
                "workspace_gib": Annotated[float, msgspec.Meta(gt=0, le=1e6)],
                "tf32": bool,
                "timing_cache": str,
                "runtime_cache": str,
                "specialization": Literal["lazy", "eager", "none"],
                "device_cuda_graphs": bool,
            },
            by_default=False,
            describe=Deferred("wanlab.engines.tensorrt.runtime:describe"),
        ),
        EngineKind(
            "tvm",
            "TVM",
            "#b0679b",
            open=Deferred("wanlab.engines.tvm.engine:open_tvm"),
            build=Deferred("wanlab.engines.tvm.build:build_graph"),
            suffixes=(".so",),
            needs=(Need("tvm", ("tvm",), 'pip install "wanlab[tvm]"', "apache-tvm"),),
            labels={"tvm-llvm": "cpu", "tvm-cuda": "cuda"},
            build_settings={
                "schedule": "loop schedule on the CPU: tiled, or plain for TVM's own loop nests",
                "fast_math": "on the CPU, polynomials for exp and tanh, and sums in another order",
            },
            open_settings={"threads": "threads of the CPU; PyTorch's own number if not given"},
            setting_types={"schedule": Literal["tiled", "plain"], "fast_math": bool, "threads": Threads},
        ),
        EngineKind(
            "streamed_vae",
            "ONNX Runtime, VAE chunk by chunk",
            "#2aa1a8",
            open=Deferred("wanlab.engines.streamed_vae:open_streamed"),
            prepare=Deferred("wanlab.engines.streamed_vae:prepare_streamed"),
            needs=(ONNXRUNTIME,),
            components=HALVES_OF_VAE,
            labels={"onnxruntime-cpu-streamed": "cpu", "onnxruntime-cuda-streamed": "cuda"},
            open_settings=ONNXRUNTIME_SETTINGS,
            setting_types=ONNXRUNTIME_TYPES,
        ),
    )
}
"""Name -> kind, in the order of tables. An engine that is part of wanlab is a file of this package and a row here."""


def register(kind: EngineKind) -> EngineKind:
    """Add a kind from outside wanlab to the table, or replace an earlier one of the same name.

    Raises:
        WanlabError: an engine of wanlab has this name.
    """
    if kind.name in OWN:
        raise WanlabError(f"an engine named {kind.name!r} is part of wanlab; give yours another name")
    ENGINES[kind.name] = kind
    return kind


OWN = frozenset(ENGINES)


def engine_kind(name: str) -> EngineKind:
    """The kind of this name.

    Raises:
        WanlabError: no such kind; the message names those that exist.
    """
    if name not in ENGINES:
        raise WanlabError(f"unknown engine {name!r}{did_you_mean(name, ENGINES)}; give {', '.join(ENGINES)}")
    return ENGINES[name]


def kind_of_label(label: str) -> EngineKind | None:
    """The kind of an engine by its label in tables: `"onnxruntime-cuda"`, `"eager, plan fp8"`, or its name."""
    plain = _without_remark(label)
    if plain in ENGINES:
        return ENGINES[plain]
    return next((kind for kind in ENGINES.values() if plain in kind.labels), None)


def _without_remark(label: str) -> str:
    """`"tvm-llvm (plain)"` and `"eager, plan fp8"` without the remark after the engine's name."""
    return re.split(r" \(|, ", label)[0]


def title_of_label(label: str) -> str:
    """The title of an engine for readers; the label itself where it belongs to no kind."""
    kind = kind_of_label(label)
    return label if kind is None else kind.titles.get(label, kind.title)


def engine_text(label: str) -> str:
    """The title of an engine as a sentence has it: "PyTorch, eager" as "eager PyTorch"."""
    return " ".join(reversed(title_of_label(label).split(", ")))


def computes_on_cpu(label: str) -> bool:
    """Whether an engine of this label computes on the CPU, also where there is a GPU."""
    kind = kind_of_label(label)
    return kind is not None and kind.labels.get(_without_remark(label)) == "cpu"


def suffixes() -> dict[str, EngineKind]:
    """File suffix -> the kind that opens it."""
    return {suffix: kind for kind in ENGINES.values() for suffix in kind.suffixes}


def open_engine(path: str | os.PathLike, **settings: Any) -> Engine:
    """The engine of a file, by its suffix.

    Args:
        path: `.onnx` (ONNX Runtime), `.engine` or `.plan` (TensorRT), `.so` (TVM).
        settings: settings of the engine, see `EngineKind.open_settings`.

    Raises:
        WanlabError: no such file, a suffix that no engine has, or as the engine itself.
    """
    path, known = Path(path), suffixes()
    suffix = path.suffix.lower()
    if suffix not in known:
        names = ", ".join(f"{suffix} ({kind.title})" for suffix, kind in known.items())
        raise WanlabError(f"{path} is no engine; give a file that ends in {names}")
    if not path.is_file():
        raise WanlabError(f"no file at {path}")
    return known[suffix].open(None, None, path, **settings)


def open_component(
    name: str,
    model: Model,
    component: str,
    folder: str | os.PathLike,
    *,
    size: Mapping[str, int | None] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Engine:
    """One component of a model in an engine; its file is prepared first if it is missing or out of date.

    Args: as `prepare_component`.

    Raises:
        WanlabError: as `prepare_component`, or as the engine itself.
    """
    path = prepare_component(name, model, component, folder, size=size, progress=progress, **settings)
    return engine_kind(name).open(model, component, path, **engine_kind(name).opening(settings))


def prepare_component(
    name: str,
    model: Model,
    component: str,
    folder: str | os.PathLike,
    *,
    size: Mapping[str, int | None] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Path | None:
    """Path of the file that an engine opens for one component, written unless it is current; None without a file.

    Args:
        name: name of the engine.
        component: name of the component.
        folder: folder of graphs and built files, which are reused while they are current.
        size: height, width (pixels), frames, text_tokens and batch (default 1) of the inputs; the model's default where
            not given.
        settings: settings of this engine, see `EngineKind.settings`.

    Raises:
        WanlabError: an unknown engine, component or setting, a missing package, or as the export and the builder.
    """
    kind = engine_kind(name)
    kind.check(component, settings)
    if kind.prepare is None:
        return None
    size = {"batch": 1, **(size or {})}
    return kind.prepare(model, component, folder, size=size, progress=progress, **kind.building(settings))


run_files(os.environ.get(VARIABLE, ""), VARIABLE, "wanlab_engine")
