"""An ONNX graph of fixed sizes compiled by Apache TVM into a library of its own.

ONNX -> Relax (TVM's graph form) -> one loop nest per group of fused operators -> schedule -> LLVM or CUDA -> `.so`.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanlab.convert.onnx.identity import file_sha256, graph_sha256
from wanlab.convert.tvm import receipt as receipts
from wanlab.convert.tvm.receipt import TvmReceipt
from wanlab.errors import WanlabError, did_you_mean, require

SCHEDULES = ("tiled", "plain")
MAX_WEIGHTS_BYTES = 1536 * 2**20  # they become part of the library, and the compiler holds them several times
INSTALL = '"wanlab[tvm]"'


def build_tvm(
    graph: str | os.PathLike,
    library: str | os.PathLike | None = None,
    *,
    target: str = "cpu",
    schedule: str = "tiled",
    fast_math: bool = True,
    reuse: bool = True,
) -> TvmReceipt:
    """Compile an ONNX graph; the library and its receipt appear only when all went well.

    Args:
        graph: `.onnx` file with fixed sizes (`wanlab.convert.export(..., dynamic=False)`), float32 for the CPU, float32
            or bfloat16 for CUDA.
        library: the `.so` to write; None takes `<graph>.tvm-llvm.so` or `<graph>.tvm-cuda.so` beside the graph.
        target: `"cpu"` (this machine's processor, with all it can do), `"cuda"` (this machine's GPU), or
            `"cuda:9.0"` for that compute capability, which needs no GPU but nvcc.
        schedule: of the CPU: `"tiled"`, or `"plain"` for the loop nests that TVM makes when nothing tunes them.
        fast_math: on the CPU, polynomials for exp and tanh, and sums in another order.
        reuse: keep a library that was built from the same graph, settings and version on such a processor.

    Raises:
        WanlabError: TVM is not installed, the graph has free sizes or an operator that TVM cannot read (with the
            node's name), the target is unknown, or no C++ compiler links the library.
    """
    tvm = load_tvm()
    graph = Path(graph)
    if not graph.is_file():
        raise WanlabError(f"no ONNX file at {graph}; make it with wanlab.convert.export(..., dynamic=False)")
    if schedule not in SCHEDULES:
        raise WanlabError(
            f"unknown schedule {schedule!r}{did_you_mean(schedule, SCHEDULES)}; give {' or '.join(SCHEDULES)}"
        )
    facts = target_of(tvm, target)
    on_gpu = facts["kind"] == "cuda"
    how = {"schedule": "default" if on_gpu else schedule, "fast_math": fast_math and not on_gpu}
    library = Path(library) if library else graph.with_suffix(f".tvm-{facts['kind']}.so")
    graph_hash = graph_sha256(graph)
    key = receipts.key_of(graph_hash, {"target": facts, "tvm": tvm.__version__} | how)
    if reuse and (known := receipts.kept(library, key)) is not None:
        return replace(known, cached=True)

    begin = time.perf_counter()
    module, read = _read(graph, on_gpu)
    imported = time.perf_counter()
    executable, counts = _compile(tvm, module, facts, **how)
    compiled = time.perf_counter()
    library.parent.mkdir(parents=True, exist_ok=True)
    draft = library.with_name(f".{library.stem}.{os.getpid()}.so")
    try:
        _link(executable, draft)
        linked = time.perf_counter()
        made = TvmReceipt(
            path=str(library),
            key=key,
            library_sha256=file_sha256(draft),
            graph=graph.name,
            graph_sha256=graph_hash,
            target=facts,
            tvm_version=tvm.__version__,
            **how,
            **read,
            **counts,
            size_bytes=draft.stat().st_size,
            import_ms=(imported - begin) * 1e3,
            compile_ms=(compiled - imported) * 1e3,
            link_ms=(linked - compiled) * 1e3,
        )
        os.replace(draft, library)
    finally:
        draft.unlink(missing_ok=True)
    receipts.write_receipt(made)
    return made


def load_tvm() -> Any:
    """TVM, with its threads free to move: by default it ties the calling thread to one core, and PyTorch with it.

    Raises:
        WanlabError: it is not installed.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))  # the most that an engine may ask for
    return require("tvm", INSTALL)


def target_of(tvm, target: str) -> dict[str, str]:
    """What to compile for, as TVM names it.

    Raises:
        WanlabError: an unknown target, or a GPU that is not there.
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
    """The processor as LLVM names it; a general name where a virtual machine hides what the name promises."""
    from tvm.target import codegen

    name = codegen.llvm_get_system_cpu()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    has = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    promised = {
        str(f) for f in codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": name}))
    }
    if not has or not (promised & {"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}) - has:
        return name
    return "x86-64-v3" if {"avx2", "fma", "bmi2"} <= has else "x86-64-v2"


def _read(path: Path, on_gpu: bool) -> tuple[Any, dict]:
    """The graph in Relax, and what the receipt says of it."""
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    from wanlab.convert.onnx.graph import file_bytes, nodes
    from wanlab.convert.tvm.rewrite import rewrite

    if (size := file_bytes(path)) > MAX_WEIGHTS_BYTES:
        raise WanlabError(
            f"{path.name} has {size / 2**30:.1f} GiB of weights; TVM puts them into the library, which ends at"
            f" {MAX_WEIGHTS_BYTES / 2**30:.1f} GiB: use onnxruntime or tensorrt for it"
        )
    model = onnx.load(path)
    inputs = {value.name: _type_of(path, value) for value in model.graph.input}
    outputs = {value.name: _type_of(path, value) for value in model.graph.output}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if onnx.TensorProto.FLOAT16 in kinds and on_gpu:
        raise WanlabError(
            f"{path.name} computes in float16, which this TVM does not finish compiling for CUDA;"
            " export it with dtype='bfloat16' and opset=22"
        )
    if kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} and not on_gpu:
        raise WanlabError(
            f"{path.name} computes in half precision, which TVM sums up in half precision on the CPU;"
            " export it with dtype='float32'"
        )
    count = sum(1 for _ in nodes(model))
    made = rewrite(model)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # the importer prints what it raises
            module = from_onnx(model)
    except Exception as error:
        raise WanlabError(_refusal(path, model, error)) from error
    facts = {entry.key: entry.value for entry in model.metadata_props}
    return module, {"inputs": inputs, "outputs": outputs, "metadata": facts, "rewrites": made, "nodes": count}


def _type_of(path: Path, value) -> receipts.TensorType:
    import onnx

    kind = value.type.tensor_type
    free = [dim.dim_param for dim in kind.shape.dim if not dim.HasField("dim_value")]
    if free:
        raise WanlabError(
            f"{value.name!r} of {path.name} has free axes ({', '.join(free)}); TVM is given fixed sizes:"
            " export with dynamic=False"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return dtype, tuple(dim.dim_value for dim in kind.shape.dim)


def _refusal(path: Path, model, error: Exception) -> str:
    """One line: which operators or which node TVM could not read."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = set(getattr(onnx_frontend, "_get_convert_map", dict)()) | {"If", "Constant"}
    newer = any(entry.domain in ("", "ai.onnx") and entry.version > 22 for entry in model.opset_import)
    mend = "export with opset 20 to 22, plain operators" if newer else "run it in onnxruntime"
    lacking = {node.op_type: node.name for node in model.graph.node if node.op_type not in known}
    if known > {"If", "Constant"} and lacking:
        named = ", ".join(f"{kind} ({name})" for kind, name in sorted(lacking.items()))
        return f"TVM has no {named} of {path.name}; {mend}"
    step, node = error.__traceback__, None
    while step is not None:  # the importer's frames know which node they were at
        here = step.tb_frame.f_locals.get("node")
        node, step = here if hasattr(here, "op_type") else node, step.tb_next
    where = path.name if node is None else f"{node.op_type} ({node.name}) of {path.name}"
    reason = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"TVM cannot read {where} ({type(error).__name__}: {reason}); {mend}"


def _compile(tvm, module, facts: dict[str, str], *, schedule: str, fast_math: bool) -> tuple[Any, dict]:
    from tvm import relax
    from tvm.s_tir import dlight

    from wanlab.convert.tvm.schedule import rules

    words: dict[str, Any] = dict(facts)
    if facts["kind"] == "cuda":
        limits = {"max_num_threads": 1024, "thread_warp_size": 32, "max_shared_memory_per_block": 49152}
        target = tvm.target.Target(words | limits | {"host": {"kind": "llvm"}})
    else:
        if fast_math:  # sums in vectors; NaN and infinity keep their meaning
            words |= {"fast-math-reassoc": True, "fast-math-contract": True, "fast-math-nsz": True}
        target = tvm.target.Target(words)
    try:
        with target:
            if facts["kind"] == "cuda":
                executable = tvm.compile(module, target, relax_pipeline=relax.get_default_pipeline(target))
                return executable, {"kernels": None, "scheduled": None}  # TVM's own pipeline does not say
            if fast_math:
                module = relax.transform.FastMathTransform()(module)
            module = relax.get_pipeline("zero")(module)
            if schedule == "tiled":
                module = dlight.ApplyDefaultSchedule(*rules())(module)
            functions = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
            scheduled = sum("tirx.is_scheduled" in function.attrs for function in functions)
            return tvm.compile(module, target), {"kernels": len(functions), "scheduled": scheduled}
    except Exception as error:  # TVM raises its own and Python's exceptions, with pages of program text
        reason = (str(error).strip() or "no message").splitlines()[0][:300]
        raise WanlabError(
            f"TVM cannot compile for {facts['kind']}: {type(error).__name__}: {reason}"
        ) from error


def _link(executable, path: Path) -> None:
    try:
        executable.export_library(str(path))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise WanlabError(
            f"no library from TVM: {reason} (it links with a C++ compiler; install g++, or set CXX)"
        ) from error
