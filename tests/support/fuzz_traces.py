"""Parsers of traces and profiles, with inputs to mutate: each reads a file and makes everything that is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.foreign_traces import TRACES
from wanlab import diagnose, engine_report

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


class Parser(NamedTuple):
    """A function of a path, and contents of files that it reads."""

    read: Callable[[Path], object]
    seeds: tuple[bytes, ...]
    suffix: str = ".json"


def trace(path: Path) -> object:
    profile = diagnose.read_trace(path)
    diagnose.breakdown(profile), diagnose.flames(profile), profile.facts()
    return diagnose.traced_measurements(profile)


def memory(path: Path) -> object:
    return str(diagnose.memory_account(diagnose.read_trace(path)))


def trimmed(path: Path) -> object:
    return diagnose.trim(path, path.with_name("trimmed.json.gz"), shortest_us=0)


def report(path: Path) -> object:
    found = engine_report.summarize(engine_report.read_layers(path))
    return found.answer(), found.caveat, found.lint_frame(), found.top(), found.by_site


def times(path: Path) -> object:
    layers = engine_report.read_inspector(FIXTURES / "inspector" / "documented_10x.json")
    return engine_report.summarize(engine_report.with_times(layers, path)).answer()


def latency(path: Path) -> object:
    return engine_report.read_latency(path)


def planned(path: Path) -> object:
    return engine_report.read_planned(path)


def _bytes(*names: str) -> tuple[bytes, ...]:
    return tuple((FIXTURES / name).read_bytes() for name in names)


_MEMORY = (
    b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 5, "dur": 90},'
    b'{"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": 10, "args": {"Bytes": 4096,'
    b' "Total Allocated": 8192, "Total Reserved": 16384, "Device Type": 1, "Device Id": 0, "Addr": 140001}},'
    b'{"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": 50, "args": {"Bytes": -4096,'
    b' "Total Allocated": 4096, "Total Reserved": 16384, "Device Type": 1, "Device Id": 0, "Addr": 140001}}]}'
)
_PROFILE = (
    b'[{"cat": "Session", "pid": 1, "tid": 1, "dur": 9, "ts": 1, "ph": "X", "name": "model_run", "args": {}},'
    b'{"cat": "Node", "pid": 1, "tid": 1, "dur": 5, "ts": 2, "ph": "X", "name": "blocks.0.attn1.to_q/MatMul_kernel_time",'
    b' "args": {"op_name": "MatMul", "node_index": "3", "provider": "CPUExecutionProvider", "parameter_size": "1024",'
    b' "input_type_shape": [{"float": [1, 24]}, {"float": [24, 8]}], "output_type_shape": [{"float": [1, 8]}]}}]'
)

PARSERS: dict[str, Parser] = {
    "trace": Parser(trace, tuple(TRACES.values())),
    "memory of a trace": Parser(memory, (_MEMORY,)),
    "trimmed trace": Parser(trimmed, tuple(TRACES.values())),
    "inspector": Parser(report, _bytes("inspector/documented_10x.json", "inspector/documented_11x.json")),
    "ONNX Runtime profile": Parser(report, (_PROFILE,)),
    "times of layers": Parser(times, _bytes("inspector/documented_profile.json")),
    "times of runs": Parser(
        latency,
        (*_bytes("inspector/documented_times.json"), b'{"samples": {"device": {"values_ms": [1.5, 2]}}}'),
    ),
    "planned formats": Parser(
        planned, (b'{"blocks.*.attn1.to_q": "int8"}', b'{"layers": [{"layer": "a", "format": "fp8"}]}')
    ),
}
