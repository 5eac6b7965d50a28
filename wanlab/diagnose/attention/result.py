"""A map of attention heads, kept in a file of its own."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.diagnose.attention.calls import CROSS, FORWARD, SELF
from wanlab.diagnose.attention.statistics import BLOCK_KEYS, LEVELS_PERCENT, error_name, statistic_names
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

PLACE = ("component", "step", "branch", "kind", "layer", "head")
HEAD_TYPES = ("spatial", "temporal", "global")
_MAGIC = "wanlab attention map 1"


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Statistics of attention heads.

    Attributes:
        frame: one row per component, step, branch, kind ("self", "cross"), layer and head: type of the head and the
            statistics of `self_statistics` and `cross_statistics`, averaged over queries, each beside its standard error
            (density95_percent, density95_se_percent). What a kind does not have is NaN.
        facts: model, weights, dtype, grid (tokens along frames, height, width), heads, layers, queries_per_frame, text_keys,
            prompt_tokens by branch, near_window, settings, notes.
        times_ms: per component what `attention_times` measured, see `with_times`; empty if it did not.
    """

    frame: pd.DataFrame
    facts: dict[str, Any]
    times_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, kind: str = SELF, branch: str | None = None) -> pd.DataFrame:
        """Rows of one kind of attention, and of one branch if given."""
        table = self.frame[self.frame["kind"] == kind]
        return table if branch is None else table[table["branch"] == branch]

    def types(self) -> pd.DataFrame:
        """Share of each type among the self-attention heads: component, step, branch, spatial_percent, temporal_percent,
        global_percent."""
        table = self.of()
        where = ["component", "step", "branch"]
        shares = table[where].assign(
            **{f"{name}_percent": 100.0 * (table["type"] == name) for name in HEAD_TYPES}
        )
        means = shares.groupby(where, sort=False).mean()
        return means.reset_index().sort_values(["step", "branch"], ignore_index=True)

    def about(self) -> pd.DataFrame:
        """The facts as a table of names and values."""
        import pandas as pd

        facts = {name: value for name, value in self.facts.items() if name != "settings" and value != []}
        facts |= self.facts.get("settings", {})
        return pd.DataFrame({"fact": list(facts), "value": [_as_text(value) for value in facts.values()]})

    def row(self) -> dict[str, float]:
        """Medians over all heads, steps and branches as a flat record; of the prompt, in the branch that has it."""
        own, text = self.of(SELF), self.of(CROSS, "cond")
        names = ("entropy_nats", "own_frame_percent", "first_frame_percent", "same_position_percent")
        found = {_median(name): float(own[name].median()) for name in names}
        return found | {"prompt_median_percent": float(text["prompt_percent"].median())}

    def summary(self, kind: str = SELF) -> pd.DataFrame:
        """Medians over layers, heads and steps: statistic, one column per expert and branch, uniform (what attention to all
        keys alike would give; of a prompt that of the branch "cond"), se (median standard error of one head)."""
        table = self.of(kind)
        names = [name for name in statistic_names(kind) if table[name].notna().any()]
        grouped = table.groupby(["component", "branch"], sort=False)[names].median()
        found = grouped.T.set_axis(
            [" ".join(where).removeprefix("expert_") for where in grouped.index], axis=1
        )
        even = self.uniform(kind)
        found["uniform"] = [even.get(name) for name in names]
        found["se"] = [table[error_name(name)].median() for name in names]
        return found.rename_axis("statistic").reset_index()

    def uniform(self, kind: str = SELF) -> dict[str, float]:
        """Every statistic for attention to all keys alike, averaged over all tokens."""
        grid, text = self.facts["grid"], self.facts.get("text_keys", 1)
        keys = math.prod(grid) if kind == SELF else text
        blocks = math.ceil(keys / BLOCK_KEYS)
        prompt = 100 * self.facts["prompt_tokens"].get("cond", math.nan) / text
        near = [_covered(n, size) for n, size in zip(grid[1:], self.facts["near_window"], strict=True)]
        return {
            "entropy_nats": math.log(keys),
            **{
                f"density{level}_percent": 100 * math.ceil(level * keys / 100) / keys
                for level in LEVELS_PERCENT
            },
            "block_density95_percent": 100 * math.ceil(0.95 * keys / BLOCK_KEYS) / blocks,
            "own_frame_percent": 100 / grid[0],
            "other_frames_percent": 100 - 100 / grid[0],
            "first_frame_percent": 100 / grid[0],
            "same_position_percent": 100 * (grid[0] - 1) / math.prod(grid),
            "near_position_percent": 100 * math.prod(near),
            "prompt_percent": prompt,
            "padding_percent": 100 - prompt,
        }

    def with_times(self, times: pd.DataFrame) -> AttentionMap:
        """The same map with what `attention_times` measured, per component: forwards of a generation, forward_ms and, of it,
        self_ms and cross_ms, medians of one forward."""
        whole = times[times["kind"] == FORWARD].groupby("component", sort=False).size()
        repeats = times["repeat"].nunique()
        found: dict[str, dict[str, float]] = {
            str(name): {"forwards": n / repeats} for name, n in whole.items()
        }
        one = ["repeat", "component", "step", "branch", "kind"]
        per_forward = times.groupby(one, sort=False)["time_ms"].sum().reset_index()
        for (component, kind), values in per_forward.groupby(["component", "kind"], sort=False)["time_ms"]:
            found[str(component)][f"{kind}_ms"] = float(values.median())
        return replace(self, times_ms=found)

    def save(self, path: str | os.PathLike) -> Path:
        """Write to a `.csv.gz`: one line of JSON with the facts, then the table, rounded to five digits (errors to two).

        Raises:
            WanlabError: another ending.
        """
        path = Path(path)
        if not path.name.endswith(".csv.gz"):
            raise WanlabError(f"{path.name}: an attention map is kept as .csv.gz; give that ending")
        table = self.frame.copy()
        for name in table.columns.difference([*PLACE, "type"]):
            digits = 2 if "_se_" in name else 5
            table[name] = [float(f"{value:.{digits}g}") for value in table[name]]
        head = json.dumps({"format": _MAGIC, "facts": self.facts, "times_ms": self.times_ms})
        # No time stamp: the same map is the same file.
        with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as file:
            file.write(f"{head}\n{table.to_csv(index=False)}".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttentionMap:
        """Read what `save` wrote.

        Raises:
            WanlabError: the file is not there or is no attention map.
        """
        import pandas as pd

        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                head = json.loads(file.readline())
                table = pd.read_csv(io.StringIO(file.read()))
            table["type"] = table["type"].fillna("")
            known = head["format"] == _MAGIC and set(PLACE) <= set(table.columns)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise WanlabError(
                f"{path} holds no attention map ({error}); write one with AttentionMap.save"
            ) from error
        if not known:
            raise WanlabError(
                f"{path} holds no attention map of this version; write one with AttentionMap.save"
            )
        return cls(table, head["facts"], head["times_ms"])


def _median(name: str) -> str:
    stem, _, unit = name.rpartition("_")
    return f"{stem}_median_{unit}"


def _covered(length: int, size: int) -> float:
    """Share of an axis that a window of odd size covers, clipped at the ends, in the mean over the axis."""
    reach = size // 2
    return sum(min(n + reach, length - 1) - max(n - reach, 0) + 1 for n in range(length)) / length**2


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {n:.4g}" if isinstance(n, float) else f"{name} {n}" for name, n in value.items()
        )
    if isinstance(value, list):
        return "; ".join(value) if value and isinstance(value[0], str) else " x ".join(map(str, value))
    return str(value)
