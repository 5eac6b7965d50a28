"""Compiles an ONNX graph of fixed sizes into a library with Apache TVM; build information is kept beside it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from wanlab.core.digests import graph_sha256
from wanlab.core.errors import WanlabError, did_you_mean, first_line, require
from wanlab.core.files import atomic_path, file_digest
from wanlab.engines.base import EngineBuild, TensorType
from wanlab.export.graph import file_bytes, nodes


class TvmBuildInfo(EngineBuild, frozen=True, kw_only=True):
    """Build information of one library, with the times of the build.

    Attributes:
        target: what TVM compiled for, in TVM's terms: kind, processor or architecture.
        schedule: `"tiled"` (loop schedules of this module), `"plain"` (TVM's own loop nests) or `"default"` (TVM's own
            rules for GPUs).
        fast_math: whether exp and tanh are polynomials that can be vectorised.
        rewrites: kind of rewrite of the graph -> how often it was applied.
        nodes: number of nodes of the graph before the rewrites.
        kernels: number of functions that TVM generated; None where TVM does not say it.
        scheduled: number of those functions that have a schedule; None as for `kernels`.
        import_ms, compile_ms, link_ms: time to read the graph; of scheduling and code generation; of the C++ compiler's
            link.
    """

    FORMAT: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "build again with wanlab.engines.build_tvm"

    target: dict[str, str]
    schedule: str
    fast_math: bool
    rewrites: dict[str, int]
    nodes: int
    kernels: int | None
    scheduled: int | None
    import_ms: float
    compile_ms: float
    link_ms: float

    @property
    def build_ms(self) -> float:
        """Time from the graph to a library."""
        return self.import_ms + self.compile_ms + self.link_ms

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        return {
            "engine": f"tvm-{self.target['kind']}",
            "component": self.metadata.get("component", self.graph),
            "target": self.target.get("mcpu") or self.target.get("arch", ""),
            "schedule": self.schedule,
            "fast_math": self.fast_math,
            "nodes": self.nodes,
            "kernels": self.kernels,
            "import_ms": self.import_ms,
            "compile_ms": self.compile_ms,
            "link_ms": self.link_ms,
            "build_ms": self.build_ms,
            "size_bytes": self.size_bytes,
            "tvm": self.version,
            "cached": self.cached,
        }


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite `model` in place; the names of new nodes begin with the name of the node that they replace.

    Args:
        model: graph of fixed sizes with its weights.

    Returns:
        Rewrite -> how often it was applied: `"patch convolution"`, `"tanh Gelu"`, `"square"`.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    counts = {"patch convolution": 0, "tanh Gelu": 0, "square": 0}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        replacement = _replacement(model.graph, node, shapes, kinds, weights)
        if replacement is None:
            nodes.append(node)
            continue
        rewrite_name, new = replacement
        counts[rewrite_name] += 1
        nodes.extend(new)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return counts


def _replacement(graph, node, shapes, kinds, weights) -> tuple[str, list[onnx.NodeProto]] | None:
    if node.op_type == "Conv" and _is_patch_convolution(node, shapes, weights):
        return "patch convolution", _patch_product(graph, node, shapes, weights)
    if node.op_type == "Gelu" and _attributes(node).get("approximate") == b"tanh":
        return "tanh Gelu", _tanh_gelu(graph, node, kinds)
    if node.op_type == "Pow" and node.input[1] in weights:
        exponent = onnx.numpy_helper.to_array(weights[node.input[1]])
        if exponent.size == 1 and float(exponent.ravel()[0]) == 2.0:
            square = onnx.helper.make_node("Mul", [node.input[0]] * 2, [node.output[0]], name=node.name)
            return "square", [square]
    return None


class _Writer:
    """Nodes and constants that replace one node."""

    def __init__(self, graph, node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[onnx.NodeProto] = []
        self.prefix = node.name or node.output[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(value), f"{self.prefix}/{name}")
        self.graph.initializer.append(tensor)
        return tensor.name

    def add(self, operator: str, inputs: list[str], output: str = "", **attributes) -> str:
        name = f"{self.prefix}/{operator}_{len(self.nodes)}"
        output = output or name
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output


def _is_patch_convolution(node, shapes, weights) -> bool:
    has = _attributes(node)
    size = shapes.get(node.input[0], [])[2:]
    kernel = list(has.get("kernel_shape", ()))
    return (
        node.input[1] in weights
        and bool(kernel)
        and kernel == list(has.get("strides", ()))
        and not any(has.get("pads", ()))
        and has.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and all(step == 1 for step in has.get("dilations", ()))
        and has.get("group", 1) == 1
        and len(size) == len(kernel)
        and all(have > 0 and have % k == 0 for have, k in zip(size, kernel, strict=True))
    )


def _patch_product(graph, node, shapes, weights) -> list[onnx.NodeProto]:
    """`[B, C, t*kt, h*kh, w*kw]` as `[B, t*h*w, C*kt*kh*kw]` times the flattened kernel."""
    write = _Writer(graph, node)
    kernel = list(_attributes(node)["kernel_shape"])
    batch, channels, *size = shapes[node.input[0]]
    grid = [have // k for have, k in zip(size, kernel, strict=True)]
    weight = onnx.numpy_helper.to_array(weights[node.input[1]])
    split = [batch, channels, *(n for pair in zip(grid, kernel, strict=True) for n in pair)]
    axes = range(len(kernel))
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    rows = [batch, math.prod(grid), channels * math.prod(kernel)]
    cut = write.add("Reshape", [node.input[0], write.constant("split", np.array(split, np.int64))])
    cut = write.add("Transpose", [cut], perm=order)
    cut = write.add("Reshape", [cut, write.constant("rows", np.array(rows, np.int64))])
    out = write.add("MatMul", [cut, write.constant("weight", weight.reshape(len(weight), -1).T)])
    if len(node.input) > 2 and node.input[2]:
        out = write.add("Add", [out, node.input[2]])
    out = write.add("Transpose", [out], perm=[0, 2, 1])
    shape = write.constant("grid", np.array([batch, len(weight), *grid], np.int64))
    write.add("Reshape", [out, shape], node.output[0])
    return write.nodes


def _tanh_gelu(graph, node, kinds) -> list[onnx.NodeProto]:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as the ONNX operator defines it."""
    write = _Writer(graph, node)
    x = node.input[0]
    kind = onnx.helper.tensor_dtype_to_np_dtype(kinds.get(x, onnx.TensorProto.FLOAT))
    scale = math.sqrt(2 / math.pi)
    square = write.add("Mul", [x, x])
    inner = write.add("Mul", [square, write.constant("cubic", np.array(0.044715 * scale, kind))])
    inner = write.add("Add", [inner, write.constant("linear", np.array(scale, kind))])
    inner = write.add("Tanh", [write.add("Mul", [inner, x])])
    inner = write.add("Add", [inner, write.constant("one", np.array(1, kind))])
    half = write.add("Mul", [x, write.constant("half", np.array(0.5, kind))])
    write.add("Mul", [half, inner], node.output[0])
    return write.nodes


def _attributes(node) -> dict:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


ROWS = 6
PARALLEL_ABOVE = 16_384  # elements; below, starting the threads costs more than the loop
CHUNKS = 32  # parallel pieces that are enough for any number of threads here


def rules() -> list:
    """dlight schedule rules, which are tried in order on every function of a module."""
    from tvm.s_tir import dlight

    return [_rule("Matmul", _matmul), _guarded(dlight.cpu.Reduction()), _rule("Elementwise", _elementwise)]


def _rule(name: str, schedule):
    """A dlight rule from a function; a loop nest that it cannot schedule is not changed."""
    from tvm.s_tir.dlight.base import ScheduleRule

    @ScheduleRule.from_callable(name)
    def rule(function, target, _tunable):
        from tvm.s_tir.schedule import ScheduleError

        try:
            return schedule(function, target)
        except ScheduleError:
            return None

    return rule


def _guarded(rule):
    def schedule(function, target):
        # For a convolution the rule is slower than no schedule.
        if any("conv" in info.name for info in _blocks(function)[1]):
            return None
        return rule.apply(function, target, False)

    return _rule(type(rule).__name__, schedule)


def _blocks(function):
    from tvm import s_tir, tirx
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    if not isinstance(function, tirx.PrimFunc):
        return None, ()
    schedule = s_tir.Schedule(function)
    return schedule, normalize_prim_func(schedule) or ()


def _matmul(function, target):
    """Tile, unroll and vectorise a matrix product; elementwise operations after it run inside the tile."""
    schedule, blocks = _blocks(function)
    products = [i for i, info in enumerate(blocks) if not info.is_injective()]
    if len(products) != 1 or "matmul" not in blocks[products[0]].name:
        return None
    at = products[0]
    sizes = [iteration.dom for iteration in blocks[at].iters]
    if not all(isinstance(size, int) for size in sizes) or not blocks[at].dom_kind().endswith("SSR"):
        return None
    block = blocks[at].block_rv
    if (after := _inline(schedule, blocks, at)) is None:
        after = schedule.cache_write(block, 0, "global")

    *batch, row, column, depth = schedule.get_loops(block)
    lanes, most = _registers(target)
    vector = _largest_divisor(sizes[-2], lanes)
    vectors = _largest_divisor(sizes[-2] // vector, most)
    rows, row_in = schedule.split(row, [None, _largest_divisor(sizes[-3], ROWS)])
    columns, column_in, lane = schedule.split(column, [None, vectors, vector])
    schedule.reorder(*batch, rows, columns, depth, row_in, column_in, lane)
    schedule.reverse_compute_at(after, columns)
    _vectorise_innermost(schedule, after, vector)
    # Read the loops again: a loop of one iteration may have been replaced when the other block was moved into it.
    *outer, depth, row_in, column_in, lane = schedule.get_loops(block)
    schedule.parallel(schedule.fuse(*outer))
    schedule.vectorize(lane)
    schedule.unroll(row_in)
    schedule.unroll(column_in)
    start = schedule.decompose_reduction(block, depth)
    row_in, column_in, lane = schedule.get_loops(start)[-3:]
    schedule.vectorize(lane)
    schedule.unroll(row_in)
    schedule.unroll(column_in)
    return schedule


def _inline(schedule, blocks, at: int):
    """Inline every block except the product and the last block; returns the last block, if there is one after it."""
    for info in blocks[:at]:
        schedule.compute_inline(info.block_rv)
    *between, last = [info.block_rv for info in blocks[at:]]
    for other in between[1:]:
        schedule.compute_inline(other)
    return last if between else None


def _vectorise_innermost(schedule, block, vector: int) -> None:
    _, lane = schedule.split(schedule.get_loops(block)[-1], [None, vector])
    schedule.vectorize(lane)


def _elementwise(function, _target):
    """Run the outer loops in parallel threads; LLVM vectorises the inner ones."""
    schedule, blocks = _blocks(function)
    if len(blocks) != 1 or not blocks[0].is_injective():
        return None
    sizes = [iteration.dom for iteration in blocks[0].iters]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if math.prod(sizes) < PARALLEL_ABOVE:
        return None
    outer, count = 1, 0
    while outer < CHUNKS and count < len(sizes) - 1:
        outer *= sizes[count]
        count += 1
    loops = schedule.get_loops(blocks[0].block_rv)
    if not count or len(loops) != len(sizes):
        return None
    schedule.parallel(schedule.fuse(*loops[:count]))
    return schedule


def _registers(target) -> tuple[int, int]:
    """Number of float32 lanes of a vector register, and number of registers for a row of the tile."""
    from tvm.target import codegen

    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return (16, 4) if "avx512f" in features else (8, 2) if "avx" in features else (4, 2)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


SCHEDULES = ("tiled", "plain")
MAX_WEIGHTS_BYTES = 1536 * 2**20  # they become part of the library, and the compiler has several copies
INSTALL = '"wanlab[tvm]"'


def build_tvm(
    graph: str | os.PathLike,
    library: str | os.PathLike | None = None,
    *,
    target: str = "cpu",
    schedule: str = "tiled",
    fast_math: bool = True,
    reuse: bool = True,
) -> TvmBuildInfo:
    """Compile an ONNX graph; the library and its build information are written only after a successful build.

    Args:
        graph: `.onnx` file with fixed sizes (`wanlab.export.export(..., dynamic=False)`), float32 for the CPU, float32
            or bfloat16 for CUDA.
        library: path of the `.so` to write; None is `<graph>.tvm-llvm.so` or `<graph>.tvm-cuda.so` beside the graph.
        target: `"cpu"` (this machine's processor with all its instructions), `"cuda"` (this machine's GPU), or
            `"cuda:9.0"` for that compute capability, which needs nvcc but no GPU.
        schedule: loop schedule on the CPU: `"tiled"`, or `"plain"` for TVM's own loop nests without tuning.
        fast_math: whether exp and tanh are polynomials and sums may be reordered, on the CPU.
        reuse: whether to keep a library that was built from the same graph, settings and version for the same processor.

    Raises:
        WanlabError: TVM is not installed, the graph has free sizes or an operator that TVM cannot read (with the
            node's name), the target is unknown, or no C++ compiler links the library.
    """
    tvm = load_tvm()
    graph = Path(graph)
    if not graph.is_file():
        raise WanlabError(f"no ONNX file at {graph}; export it with wanlab.export.export(..., dynamic=False)")
    if schedule not in SCHEDULES:
        raise WanlabError(
            f"unknown schedule {schedule!r}{did_you_mean(schedule, SCHEDULES)}; give {' or '.join(SCHEDULES)}"
        )
    facts = target_of(tvm, target)
    on_gpu = facts["kind"] == "cuda"
    settings: dict[str, Any] = {
        "schedule": "default" if on_gpu else schedule,
        "fast_math": fast_math and not on_gpu,
    }
    library = Path(library) if library else graph.with_suffix(f".tvm-{facts['kind']}.so")
    graph_hash = graph_sha256(graph)
    sources = {"graph": graph_hash, "target": facts, "tvm": tvm.__version__} | settings
    if reuse and (known := TvmBuildInfo.current(library, sources)[0]) is not None:
        return known

    begin = time.perf_counter()
    module, read = _read(graph, on_gpu)
    imported = time.perf_counter()
    executable, counts = _compile(tvm, module, facts, **settings)
    compiled = time.perf_counter()
    with atomic_path(library, ".so") as draft:
        _link(executable, draft)
        linked = time.perf_counter()
        info = TvmBuildInfo(
            path=str(library),
            facts=sources,
            engine_sha256=file_digest(draft),
            graph=graph.name,
            graph_sha256=graph_hash,
            target=facts,
            version=tvm.__version__,
            **settings,
            **read,
            **counts,
            size_bytes=draft.stat().st_size,
            import_ms=(imported - begin) * 1e3,
            compile_ms=(compiled - imported) * 1e3,
            link_ms=(linked - compiled) * 1e3,
        )
    info.write()
    return info


def build_graph(
    graph: str | os.PathLike, *, device: str = "cpu", progress: bool = False, **settings: Any
) -> Path:
    """The library of an ONNX graph for `"cpu"` or `"cuda"`, beside it; the `build` of the kind `tvm`."""
    return Path(build_tvm(graph, target=device, **settings).path)


def load_tvm() -> Any:
    """The module `tvm` without thread affinity: by default TVM pins the calling thread to one core, and so slows PyTorch.

    Raises:
        WanlabError: TVM is not installed.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault(
        "TVM_NUM_THREADS", str(os.cpu_count() or 1)
    )  # the largest number that an engine may use
    return require("tvm", INSTALL)


def target_of(tvm, target: str) -> dict[str, str]:
    """The target in TVM's terms: kind, processor or architecture.

    Raises:
        WanlabError: an unknown target, or no GPU.
    """
    kind, _, capability = target.partition(":")
    if kind == "cpu" and not capability:
        return {"kind": "llvm", "mcpu": _processor(tvm)}
    if kind != "cuda":
        raise WanlabError(
            f"unknown TVM target {target!r}{did_you_mean(kind, ('cpu', 'cuda'))}; give cpu, cuda or cuda:9.0"
        )
    if not capability:
        if not tvm.runtime.enabled("cuda") or not tvm.cuda(0).exist:
            raise WanlabError(
                "TVM sees no NVIDIA GPU here; give target='cpu', or 'cuda:9.0' to build for another machine"
            )
        capability = tvm.cuda(0).compute_version
    major, dot, minor = capability.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise WanlabError(f"compute capability {capability!r} is not like 9.0; give target='cuda:9.0'")
    return {"kind": "cuda", "arch": f"sm_{major}{minor}"}


def _processor(tvm) -> str:
    """LLVM's name of the processor; a general name if a virtual machine hides instructions that the name implies."""
    from tvm.target import codegen

    name = str(codegen.llvm_get_system_cpu())  # TVM returns a string type of its own
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    has = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    implied = {
        str(f) for f in codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": name}))
    }
    if not has or not (implied & {"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}) - has:
        return name
    return "x86-64-v3" if {"avx2", "fma", "bmi2"} <= has else "x86-64-v2"


def _read(path: Path, on_gpu: bool) -> tuple[Any, dict]:
    """The graph in Relax, and its facts for the build information."""
    from tvm.relax.frontend.onnx import from_onnx

    if (size := file_bytes(path)) > MAX_WEIGHTS_BYTES:
        raise WanlabError(
            f"{path.name} has {size / 2**30:.1f} GiB of weights; TVM stores them in the library, whose limit is"
            f" {MAX_WEIGHTS_BYTES / 2**30:.1f} GiB: use onnxruntime or tensorrt for it"
        )
    model = onnx.load(path)
    inputs = {value.name: _type_of(path, value) for value in model.graph.input}
    outputs = {value.name: _type_of(path, value) for value in model.graph.output}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if onnx.TensorProto.FLOAT16 in kinds and on_gpu:
        raise WanlabError(
            f"{path.name} computes in float16, which this TVM cannot compile for CUDA;"
            " export it with dtype='bfloat16' and opset=22"
        )
    if kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} and not on_gpu:
        raise WanlabError(
            f"{path.name} computes in half precision, whose sums TVM also computes in half precision on the CPU;"
            " export it with dtype='float32'"
        )
    count = sum(1 for _ in nodes(model))
    rewrites = rewrite(model)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the importer prints what it raises
            module = from_onnx(model)
    except Exception as error:
        raise WanlabError(_refusal(path, model, error)) from error
    facts = {entry.key: entry.value for entry in model.metadata_props}
    return module, {
        "inputs": inputs,
        "outputs": outputs,
        "metadata": facts,
        "rewrites": rewrites,
        "nodes": count,
    }


def _type_of(path: Path, value) -> TensorType:
    kind = value.type.tensor_type
    free = [dim.dim_param for dim in kind.shape.dim if not dim.HasField("dim_value")]
    if free:
        raise WanlabError(
            f"{value.name!r} of {path.name} has free axes ({', '.join(free)}); TVM needs fixed sizes:"
            " export with dynamic=False"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return dtype, tuple(dim.dim_value for dim in kind.shape.dim)


def _refusal(path: Path, model, error: Exception) -> str:
    """One line about the operators, or the node, that TVM could not read."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = set(getattr(onnx_frontend, "_get_convert_map", dict)()) | {"If", "Constant"}
    newer = any(entry.domain in ("", "ai.onnx") and entry.version > 22 for entry in model.opset_import)
    mend = "export with opset 20 to 22, plain operators" if newer else "run it in onnxruntime"
    lacking = {node.op_type: node.name for node in model.graph.node if node.op_type not in known}
    if known > {"If", "Constant"} and lacking:
        named = ", ".join(f"{kind} ({name})" for kind, name in sorted(lacking.items()))
        return f"TVM has no {named} of {path.name}; {mend}"
    step, node = error.__traceback__, None
    while step is not None:  # the importer's frames have the node as a local variable
        local = step.tb_frame.f_locals.get("node")
        node, step = local if hasattr(local, "op_type") else node, step.tb_next
    place = path.name if node is None else f"{node.op_type} ({node.name}) of {path.name}"
    return f"TVM cannot read {place} ({type(error).__name__}: {first_line(str(error), 200)}); {mend}"


def _compile(tvm, module, facts: dict[str, str], *, schedule: str, fast_math: bool) -> tuple[Any, dict]:
    from tvm import relax
    from tvm.s_tir import dlight

    options: dict[str, Any] = dict(facts)
    if facts["kind"] == "cuda":
        limits = {"max_num_threads": 1024, "thread_warp_size": 32, "max_shared_memory_per_block": 49152}
        target = tvm.target.Target(options | limits | {"host": {"kind": "llvm"}})
    else:
        if fast_math:  # sums in vectors; NaN and infinity are still handled
            options |= {"fast-math-reassoc": True, "fast-math-contract": True, "fast-math-nsz": True}
        target = tvm.target.Target(options)
    try:
        with target:
            if facts["kind"] == "cuda":
                executable = tvm.compile(module, target, relax_pipeline=relax.get_default_pipeline(target))
                return executable, {
                    "kernels": None,
                    "scheduled": None,
                }  # TVM's own pipeline does not report it
            if fast_math:
                module = relax.transform.FastMathTransform()(module)
            module = relax.get_pipeline("zero")(module)
            if schedule == "tiled":
                module = dlight.ApplyDefaultSchedule(*rules())(module)
            functions = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
            scheduled = sum("tirx.is_scheduled" in function.attrs for function in functions)
            return tvm.compile(module, target), {"kernels": len(functions), "scheduled": scheduled}
    except Exception as error:  # TVM raises its own and Python's exceptions, with pages of program text
        raise WanlabError(
            f"TVM cannot compile for {facts['kind']}: {type(error).__name__}: {first_line(str(error))}"
        ) from error


def _link(executable, path: Path) -> None:
    try:
        executable.export_library(str(path))
    except Exception as error:
        raise WanlabError(
            f"no library from TVM: {first_line(error, 200)} (it links with a C++ compiler; install g++, or set CXX)"
        ) from error
