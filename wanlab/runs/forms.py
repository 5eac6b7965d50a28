"""Types of the fields of wanlab's own JSON files that are read again; other fields of the files are not looked at.

A file that another hand or a damaged disk has changed is refused by them in one line that names the field.
"""

from __future__ import annotations

from typing import Any

import msgspec


class GpuForm(msgspec.Struct):
    name: str | None = None
    sm_clock_max_mhz: float | None = None
    power_limit_w: float | None = None
    memory_gib: float | None = None
    driver: str | None = None


class EnvironmentForm(msgspec.Struct):
    """The environment of `measure.environment` in other files."""

    gpu: GpuForm | str | None = None
    cpu: str | None = None
    threads: int | None = None
    cores: int | None = None
    ram_gib: float | None = None
    packages: dict[str, str] | None = None


class RecordForm(msgspec.Struct):
    """Types of the fields of run.json that are read again."""

    name: str | None = None
    run_id: str | None = None
    notebook: str | None = None
    parameters: dict[str, Any] | None = None
    schema: list[dict[str, Any]] | None = None
    environment: EnvironmentForm | None = None
    inputs: dict[str, Any] | None = None
    repeat: int | None = None
    created: str | None = None
    finished: str | None = None
    verdict: str | None = None
    wanlab: str | None = None


class StatusForm(msgspec.Struct):
    """Types of the fields of status.json that are read again."""

    state: str | None = None
    started: str | None = None
    ended: str | None = None
    seconds: float | None = None
    heartbeat: str | None = None
    host: str | None = None
    writer: dict[str, Any] | None = None
    kernel: dict[str, Any] | None = None
    processes: list[dict[str, Any]] | None = None
    progress: dict[str, Any] | None = None
    peak_memory_gib: float | None = None
    exit: int | None = None
    reason: str | None = None
    cell: int | None = None
    title: str | None = None
    traceback: str | None = None
    output_cut_cells: list[int] | None = None


class ExecutorForm(msgspec.Struct):
    """Types of the fields of the executor in sweep.json."""

    kind: str | None = None
    slots: int = 1


class SweepRunForm(msgspec.Struct):
    """Types of the fields of a run in sweep.json."""

    run_id: str
    label: str | None = None
    notebook: str | None = None
    parameters: dict[str, Any] | None = None
    repeat: int | None = None
    machine: str | None = None
    state: str | None = None
    attempts: int | None = None


class SweepForm(msgspec.Struct):
    """Types of the fields of sweep.json."""

    name: str | None = None
    title: str | None = None
    grid_file: str | None = None
    state: str | None = None
    started: str | None = None
    ended: str | None = None
    heartbeat: str | None = None
    seconds: float | None = None
    host: str | None = None
    writer: dict[str, Any] | None = None
    executor: ExecutorForm | None = None
    axes: list[str] | None = None
    baseline: dict[str, Any] | None = None
    show: list[str] | None = None
    runs: list[SweepRunForm] | None = None


class MetricForm(msgspec.Struct):
    """A line of metrics.jsonl."""

    name: str
    value: Any


class SamplesForm(msgspec.Struct):
    values_ms: list[float]
    device: str | None = None


class BenchForm(msgspec.Struct):
    """A file of `wanlab bench`; a tensor is its dtype and its shape."""

    engine: str
    inputs: dict[str, tuple[str, list[int]]]
    samples: BenchSamplesForm
    metadata: BenchMetadataForm
    environment: EnvironmentForm
    noise_percent: float | None = None


class BenchSamplesForm(msgspec.Struct):
    latency: SamplesForm
    device: SamplesForm | None = None


class BenchMetadataForm(msgspec.Struct):
    model: str | None = None
    component: str | None = None
    load_ms: float | None = None
    size_bytes: int | None = None


class BuildForm(msgspec.Struct):
    """The record of an engine that `engines.build_tensorrt` made."""

    kind: str
    numbers: str
    version: str
    size_bytes: int
    time_ms: float
    compute_capabilities: list[str]
    model: str | None = None
    component: str | None = None
    gpu: str | None = None
