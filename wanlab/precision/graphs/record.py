"""What a folder of a plan's graphs was made from and holds: written beside them, and held against them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.onnx.identity import file_sha256
from wanlab.errors import WanlabError
from wanlab.precision.plans.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

RECORD = "plan.json"
FORMAT = 1
AGAIN = "make it with wanlab.precision.export_plan"


@dataclass(frozen=True, eq=False)
class PlanGraphs:
    """The graphs of a plan on one model.

    Attributes:
        folder: where they lie, with `plan.json`, their record.
        plan: that they compute by. model: name of the model.
        facts: what they were made from: hashes of plan, weights and calibrations by component, settings, version.
        bands: component -> first step, last step (inclusive; None where nothing changes with the step), graph.
        formats: graph -> layer -> format that it computes in, floats included.
        files: every file, weights too, relative to the folder -> SHA-256 and size in bytes.
        reused: they were there already and still true. reason: why they were made anew; empty where they were not there.
        time_ms: exporting, rounding, writing and checking, or looking them up.
    """

    folder: Path
    plan: Plan
    model: str
    facts: dict[str, Any]
    bands: dict[str, tuple[tuple[int | None, int | None, str], ...]]
    formats: dict[str, dict[str, str]]
    files: dict[str, tuple[str, int]]
    reused: bool = False
    reason: str = ""
    time_ms: float = 0.0

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.bands)

    @property
    def changes_with_step(self) -> bool:
        return any(first is not None for bands in self.bands.values() for first, _, _ in bands)

    def graphs_of(self, component: str) -> tuple[str, ...]:
        """Graphs of a component, each once, relative to the folder."""
        return tuple(dict.fromkeys(graph for _, _, graph in self.bands[component]))

    def frame(self) -> pd.DataFrame:
        """One row per component and range of steps: component, first_step, last_step, graph, formats (how many layers of
        each), size_bytes (of the graph with the weights that it uses)."""
        import pandas as pd

        from wanlab.convert.onnx.graph import file_bytes

        sizes = {graph: file_bytes(self.folder / graph) for graph in self.formats}
        rows = [
            {
                "component": component,
                "first_step": first,
                "last_step": last,
                "graph": graph,
                "formats": counted(self.formats[graph]),
                "size_bytes": sizes[graph],
            }
            for component, bands in self.bands.items()
            for first, last, graph in bands
        ]
        return pd.DataFrame(rows).astype({"first_step": "Int64", "last_step": "Int64"})

    @property
    def size_bytes(self) -> int:
        """Of all files, weights that several graphs use once."""
        return sum(size for _, size in self.files.values())


def counted(formats: Mapping[str, str]) -> str:
    """`"60 int8, 7 bf16"`."""
    counts: dict[str, int] = {}
    for name in formats.values():
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def write_record(graphs: PlanGraphs) -> Path:
    """Write the record, in one step."""
    path = graphs.folder / RECORD
    data = {
        "format": FORMAT,
        "plan": graphs.plan.to_dict(),
        "plan_hash": graphs.plan.hash,
        "model": graphs.model,
        "facts": graphs.facts,
        "bands": graphs.bands,
        "formats": graphs.formats,
        "files": graphs.files,
        "time_ms": graphs.time_ms,
    }
    draft = path.with_name(f".{RECORD}.{os.getpid()}")
    draft.write_text(json.dumps(data, indent=1), encoding="utf-8")
    os.replace(draft, path)
    return path


def read_plan_graphs(folder: str | os.PathLike, *, check: bool = True) -> PlanGraphs:
    """The graphs in a folder, by their record.

    Args:
        check: hash every graph, and look at the size of every file.

    Raises:
        WanlabError: there is no record, it cannot be read, or a file is not what it says.
    """
    folder = Path(folder)
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise WanlabError(f"{path} is of another wanlab; {AGAIN}")
        plan = data["plan"]
        rules = [dict(rule) for rule in plan.pop("rules", ())]
        graphs = PlanGraphs(
            folder,
            _plan(plan, rules),
            data["model"],
            data["facts"],
            {name: tuple(tuple(band) for band in bands) for name, bands in data["bands"].items()},
            data["formats"],
            {name: (sha256, size) for name, (sha256, size) in data["files"].items()},
            reused=True,
            time_ms=data["time_ms"],
        )
    except FileNotFoundError as error:
        raise WanlabError(f"no graphs of a plan in {folder}; {AGAIN}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WanlabError(f"{path} cannot be read ({type(error).__name__}); {AGAIN}") from error
    if check and (wrong := damage(graphs, hashed=graphs.formats)):
        raise WanlabError(f"the graphs in {folder} are not what their record says: {wrong}; {AGAIN}")
    return graphs


def files_of(folder: Path, graphs: Iterable[str]) -> tuple[str, ...]:
    """The graphs and the files of weights that they name, relative to the folder, each once."""
    import onnx

    found: dict[str, None] = {}
    for graph in graphs:
        found[graph] = None
        for tensor in onnx.load(folder / graph, load_external_data=False).graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    found[(Path(graph).parent / entry.value).as_posix()] = None
    return tuple(found)


def damage(graphs: PlanGraphs, *, hashed: Mapping[str, Any] | None = None) -> str:
    """What is wrong with the files, in a few words; empty when nothing is.

    Args:
        hashed: files to hash; None hashes all. Of the others the size is looked at.
    """
    for name, (sha256, size) in graphs.files.items():
        path = graphs.folder / name
        if not path.is_file():
            return f"{name} is gone"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, it was written with {size:,}"
        if (hashed is None or name in hashed) and file_sha256(path) != sha256:
            return f"{name} was changed"
    return ""


def staleness(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first fact that differs, in words; empty when all are the same."""
    for name, value in now.items():
        was = before.get(name)
        if was == value:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            for part in dict.fromkeys((*value, *was)):
                if was.get(part) != value.get(part):
                    return f"{name.replace('_', ' ')}: {part} {_changed(was.get(part), value.get(part))}"
        return f"{name.replace('_', ' ')} {_changed(was, value)}"
    return ""


def _changed(was: Any, now: Any) -> str:
    def short(value: Any) -> str:
        return str(value)[:12] if isinstance(value, str) else str(value)

    return f"was {short(was)}, is {short(now)}"


def _plan(fields: dict[str, Any], rules: list[dict[str, Any]]) -> Plan:
    from wanlab.precision.plans.plan import make_plan

    for rule in rules:
        if "layers" in rule:
            rule["layers"] = tuple(rule["layers"])
    name, default = fields.pop("name"), fields.pop("default")
    return make_plan(name, default, rules, **fields)
