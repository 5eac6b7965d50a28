"""Small traces as other programs, other accelerators and older profilers write them; by hand, event by event."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

from support.diagnose_traces import event

EPOCH = 1_719_651_234_567_890  # microseconds since 1970, as Kineto writes them


def work(
    runtime: str = "cuda_runtime",
    launch: str = "cudaLaunchKernel",
    copy: str = "Memcpy HtoD (Pinned -> Device)",
) -> list[dict]:
    """A product of 40 µs, a softmax of 30 and a copy of 20, in 100 µs; the GPU waits for the other 10."""
    device = dict(thread=107, stream=7)
    return [
        event("aten::mm", EPOCH, 10),
        event(launch, EPOCH + 2, 1, runtime, correlation=1),
        event("gemm", EPOCH + 10, 40, "kernel", correlation=1, **device),
        event("aten::softmax", EPOCH + 20, 10),
        event(launch, EPOCH + 22, 1, runtime, correlation=2),
        event("softmax_k", EPOCH + 50, 30, "kernel", correlation=2, **device),
        event("aten::copy_", EPOCH + 40, 10),
        event(launch, EPOCH + 42, 1, runtime, correlation=3),
        event(copy, EPOCH + 80, 20, "gpu_memcpy", correlation=3, **device),
    ]


def older_kineto() -> dict:
    """Words of 2021: categories with capital letters, ranges among the operators, threads as text, `Input dims`."""
    words = {
        "cpu_op": "Operator", "cuda_runtime": "Runtime", "kernel": "Kernel", "gpu_memcpy": "Memcpy",
    }  # fmt: skip
    events = [e | {"cat": words[e["cat"]], "tid": str(e["tid"])} for e in work()]
    events[0]["args"] = {"Input dims": [[2, 3], [3, 5]]}
    step = event("ProfilerStep#0", EPOCH, 100, "Operator") | {"tid": "1"}
    return {
        "traceEvents": [step, *events],
        "computeProperties": [{"name": "Tesla V100", "totalGlobalMem": 2**35}],
    }


def ascend() -> list[dict]:
    """An array, as torch_npu writes trace_view.json: work of the NPU has no category, times are text."""
    return [
        {"ph": "M", "name": "process_name", "pid": 4, "tid": 0, "args": {"name": "Ascend Hardware"}},
        event("aten::mm", f"{EPOCH}.25", 10),
        {
            "ph": "X", "name": "MatMulV2", "pid": 4, "tid": 3, "ts": f"{EPOCH + 10}.5", "dur": 40.5,
            "args": {"Task Type": "AI_CORE"},
        },
    ]  # fmt: skip


def mtia() -> list[dict]:
    return [
        event("aten::mm", EPOCH, 10),
        event("runKernel", EPOCH + 2, 1, "mtia_runtime", correlation=1),
        event("pe_exe", EPOCH + 10, 40, "mtia_ccp_events", thread=3910, stream=112),
    ]


def autograd_profiler() -> list[dict]:
    """An array without categories, as torch.autograd.profiler writes it; its end is missing."""
    names = {"cpu_op": "CPU functions", "kernel": "CUDA functions", "gpu_memcpy": "CUDA functions"}
    kept = [e for e in work() if e["cat"] in names]
    return [
        {key: e[key] for key in ("name", "ph", "ts", "dur", "tid")} | {"pid": names[e["cat"]]} for e in kept
    ]


def xla() -> dict:
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:TPU:0"}},
        {"ph": "X", "name": "fusion.3", "pid": 1, "tid": 2, "ts": 10.0, "dur": 40.0},
    ]
    return {"traceEvents": names}


def in_pairs(events: list[dict]) -> list[dict]:
    """Each event as one of phase B and one of phase E, in order of time; the arguments stand with the end."""
    begins = [
        {key: value for key, value in e.items() if key not in ("dur", "args")} | {"ph": "B"} for e in events
    ]
    ends = [e | {"ph": "E", "ts": e["ts"] + e["dur"]} for e in events]
    for end in ends:
        del end["dur"]
    return sorted(ends + begins, key=lambda e: e["ts"])


def with_times(**changes: object) -> dict:
    """The work and one more event, whose times are changed; None leaves a time out."""
    odd = event("aten::add", EPOCH + 60, 5) | changes
    return {"traceEvents": [*work(), {key: value for key, value in odd.items() if value is not None}]}


WINDOWS = b"torch\\nn\\modules\\linear.py(219): forward"
TRACES: dict[str, bytes] = {
    name: content if isinstance(content, bytes) else json.dumps(content).encode()
    for name, content in {
        "torch.profiler on CUDA": {"traceEvents": work()},
        "time 0 in one event": with_times(ts=0, dur=0),
        "a duration that is negative": with_times(dur=-5),
        "a duration that is missing": with_times(dur=None),
        "a duration of a year": with_times(dur=3.2e13),
        "Kineto of 2021": older_kineto(),
        "ROCm": {
            "traceEvents": work(launch="hipLaunchKernel", copy="Memcpy HtoD (Host -> Device)"),
            "deviceProperties": [{"name": "AMD Instinct MI250X"}],
        },
        "ROCm, copies by its own names": {
            "traceEvents": work(launch="hipLaunchKernel", copy="CopyHostToDevice"),
        },
        "Intel XPU": {"traceEvents": work("xpu_runtime", "urEnqueueKernelLaunch", "Memcpy M2D")},
        "begins and ends in place of durations": {"traceEvents": in_pairs(work())},
        "an accelerator as PrivateUse1": {"traceEvents": work("privateuse1_runtime", "launchKernel")},
        "Cambricon MLU": {
            "traceEvents": [
                e | {"cat": e["cat"].replace("cuda_", "mlu_").replace("gpu_", "mlu_")} for e in work()
            ]
        },
        "Ascend NPU": ascend(),
        "Meta MTIA": {"traceEvents": mtia()},
        "XLA": xla(),
        "launches, but no kernels": {"traceEvents": [e for e in work() if e["cat"] in ("cpu_op", "cuda_runtime")]},
        "a GPU in the machine, no events of it": {
            "traceEvents": [e for e in work() if e["cat"] == "cpu_op"],
            "deviceProperties": [{"name": "NVIDIA A100"}],
        },
        "a category of another tool beside the kernels": {
            "traceEvents": [*work(), event("batch", EPOCH, 60, "dataloader", thread=55)]
        },
        "torch.autograd.profiler, an array without an end": json.dumps(autograd_profiler()).encode()[:-1] + b",",
        "paths of Windows with single backslashes": json.dumps(
            {"traceEvents": [*work(), event("PATH", EPOCH + 1, 8, "python_function")]}
        ).encode().replace(b"PATH", WINDOWS),
        "quotes in a kernel's name": json.dumps({"traceEvents": work()}).encode().replace(b"softmax_k", b'k<"x">'),
        "NaN for an occupancy": json.dumps({"traceEvents": work()}).encode().replace(
            b'"stream": 7', b'"stream": 7, "est. achieved occupancy %": NaN'
        ),
        "control characters": json.dumps({"traceEvents": work()}).encode().replace(b"softmax_k", b"softmax\x01\tk"),
        "a byte order mark": b"\xef\xbb\xbf" + json.dumps({"traceEvents": work()}).encode(),
        "UTF-16": json.dumps({"traceEvents": work()}).encode("utf-16"),
        "Latin-1": json.dumps({"traceEvents": work()}).encode().replace(b"softmax_k", b"softmax_\xe9"),
        "gzip": gzip.compress(json.dumps({"traceEvents": work()}).encode(), mtime=0),
    }.items()
}  # fmt: skip
"""What it is -> the bytes of the file."""


def zipped(**files: bytes) -> bytes:
    """A zip of files by name; `__` stands for a dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


TRACES["a zip"] = zipped(trace__json=TRACES["torch.profiler on CUDA"])


def write(folder: Path, name: str) -> Path:
    path = folder / "trace.json"
    path.write_bytes(TRACES[name])
    return path
