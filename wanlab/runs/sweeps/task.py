"""One run of a sweep, as data that another process or machine can read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wanlab.runs.folder import RunFolder


@dataclass(frozen=True)
class Task:
    """What to run, where, and how much of the machine it needs.

    Attributes:
        label: how people know it: the varied parameters. axes: the same as data.
        overrides: parameters given to the notebook. expected: its run_id when the sweep started.
        output, name: `output/name/run_id/` is its folder; absolute, as workers may start elsewhere. cwd: where it runs.
    """

    label: str
    notebook: str
    overrides: dict[str, Any]
    axes: dict[str, Any]
    output: str
    name: str
    run_id: str
    cwd: str
    repeat: int = 1
    machine: str = "shared"
    limit_s: float | None = None
    memory_limit_gib: float | None = None
    output_limit_mib: float = 256.0
    cpus: float = 1.0
    gpus: float | None = None
    force: bool = False

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(Path(self.output), self.name, self.run_id)

    @property
    def log(self) -> Path:
        """What the worker itself says; a run's own output is in its folder."""
        return Path(self.output) / self.name / "logs" / f"{self.run_id}.log"

    @property
    def alone(self) -> bool:
        return self.machine == "alone"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))
