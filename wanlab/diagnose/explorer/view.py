"""`diagnose.explore`: selections of a trace's events, queries in SQL over them, and what changed to a second trace."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from wanlab.core.answer import Answer, answer, step
from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.words import percent_text, size_text, time_text
from wanlab.diagnose.breakdown import category_name
from wanlab.diagnose.explorer.events import GPU, Events, event_table
from wanlab.diagnose.explorer.questions import QUESTIONS
from wanlab.diagnose.profile_answer import NEXT, RANKS, with_article
from wanlab.diagnose.trace import Trace
from wanlab.measure.ceilings import Ceilings, recorded_ceilings

MOST_ROWS = 1_000_000
SECONDS = 60.0
"""Of one query; another that takes longer is stopped."""
CONDITIONS = ("between", "component", "step", "category", "module", "name", "search", "side")
"""Conditions of `select` that the view of `plots.explorer` sets."""
CHOICES = ("side", "kind", "component", "category", "operation", "lane")
"""Columns with few values, of which a name that is in none is a mistake."""


class Exploration:
    """A trace to be explored; from `explore`.

    Attributes:
        trace, events: the trace and its table.
        compare: the second trace, explored alike; None without one.
        ceilings: of the traced device; None where they are not known.
        chosen: arguments of `select` for `selection`; the view of `plots.explorer` sets them.
    """

    def __init__(self, trace: Trace, ceilings: Ceilings | None, compare: Exploration | None = None):
        self.trace, self.ceilings, self.compare = trace, ceilings, compare
        self.events: Events = event_table(trace, ceilings)
        self.chosen: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Exploration({self.trace.path.name}, {len(self.events.frame):,} events)"

    @property
    def joint(self) -> bool:
        """Whether the model's self-attention is joint attention of video and text, as the capture states."""
        return bool(self.trace.generation.get("joint_attention"))

    @property
    def selection(self) -> pd.DataFrame:
        """The events that are selected in the view; all that are the work until something is."""
        return self.select(**({"side": self.events.side} | self.chosen))

    def select(
        self,
        *,
        between: tuple[float, float] | None = None,
        step: int | Collection[int] | None = None,
        name: str | Collection[str] | None = None,
        module: str | None = None,
        search: str | None = None,
        **choices: str | Collection[str] | None,
    ) -> pd.DataFrame:
        """The events that meet every condition.

        Args:
            between: start and end in µs, as `start_us`: events that overlap it.
            step, name: one value, or several.
            module: path of a module, in which * stands for all layers: "expert_low.blocks.*.attn1"; events inside it.
            search: text in the name, module or shapes, in small or capital letters.
            choices: `component`, `category`, `side` ("host" or "gpu"), `kind`, `operation`, `lane`: one value or several.

        Returns:
            Rows of `Events.frame` with their number as index, and `inside_us`: the part of `own_us` inside `between`. The
            sum of `inside_us` over intervals that divide the trace is that of `own_us`.

        Raises:
            WanlabError: an unknown condition or value, with the nearest known one; an interval that ends before its start.
        """
        frame = self.events.frame
        chosen = np.ones(len(frame), dtype=bool)
        for column, value in choices.items():
            if column not in CHOICES:
                known = (*CHOICES, "between", "step", "name", "module", "search")
                raise WanlabError(f"select has no condition {column!r}{did_you_mean(column, known)}")
            if value is not None:
                chosen &= self._is_one_of(column, _several(value))
        exact: tuple[tuple[str, Any], ...] = (("step", step), ("name", name))
        for column, values in exact:
            if values is not None:
                chosen &= frame[column].isin(_several(values)).to_numpy()
        if module is not None:
            names = [LAYER.sub(".*", m) if "*" in module else m for m in frame["module"].cat.categories]
            chosen &= _by_category(
                frame["module"], [m == module or m.startswith(f"{module}.") for m in names]
            )
        if search:
            text = search.lower()
            found = [
                _by_category(frame[c], [text in n.lower() for n in frame[c].cat.categories]) for c in SEARCHED
            ]
            chosen &= np.logical_or.reduce(found)
        inside = frame["own_us"].to_numpy()
        if between is not None:
            low, high = map(float, between)
            if not low <= high:
                raise WanlabError(
                    f"between=({low:g}, {high:g}) ends before it begins; give (start, end) in µs"
                )
            inside = self._inside(low, high)
            starts = frame["start_us"].to_numpy()
            chosen &= (starts < high) & (starts + frame["time_us"].to_numpy() > low)
        rows = np.flatnonzero(chosen)
        return frame.iloc[rows].assign(inside_us=inside[rows])

    def _is_one_of(self, column: str, values: Collection[Any]) -> np.ndarray:
        known = list(self.events.frame[column].cat.categories)
        for value in values:
            if value not in known:
                raise WanlabError(
                    f"no {column} is {value!r}{did_you_mean(str(value), known) or '; there are ' + ', '.join(known)}"
                )
        return self.events.frame[column].isin(list(values)).to_numpy()

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends of all events, no later than those of the host events around them; and the rows with an event around."""
        frame = self.events.frame
        starts, parents = frame["start_us"].to_numpy(), frame["parent"].to_numpy()
        ends = starts + frame["time_us"].to_numpy()
        nested = (frame["side"] != GPU).to_numpy() & (parents >= 0)
        depth = frame["depth"].to_numpy()
        for level in range(1, int(depth.max(initial=0)) + 1):
            here = np.flatnonzero(nested & (depth == level))
            ends[here] = np.maximum(np.minimum(ends[here], ends[parents[here]]), starts[here])
        return ends, np.flatnonzero(nested)

    def _inside(self, low: float, high: float) -> np.ndarray:
        """Own time of every event between two moments."""
        ends, nested = self._ends
        frame = self.events.frame
        spent = np.maximum(np.minimum(ends, high) - np.maximum(frame["start_us"].to_numpy(), low), 0.0)
        of_children = np.bincount(
            frame["parent"].to_numpy()[nested], weights=spent[nested], minlength=len(spent)
        )
        return np.maximum(spent - of_children, 0.0)

    def query(self, sql: str) -> pd.DataFrame:
        """The result of one SELECT in DuckDB's SQL.

        Tables: `events` (as `Events.frame`, with `row`), `work` (its events that are the work), `stretches` (the wall clock
        by category); with a second trace its `other_events`, `other_work` and `other_stretches`. Nothing outside of them
        can be read or written.

        Raises:
            WanlabError: not one SELECT, a mistake in it, a file or extension, over `MOST_ROWS` rows or `SECONDS`.
        """
        try:
            statements = self._database.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise WanlabError(f"query takes one SELECT, not {_short(sql)}; nothing else is allowed")
            timer = threading.Timer(SECONDS, self._database.interrupt)
            timer.start()
            try:
                result = self._database.execute(sql)
                parts, rows = [result.fetch_df_chunk(64)], 0
                while len(parts[-1]) and (rows := rows + len(parts[-1])) <= MOST_ROWS:
                    parts.append(result.fetch_df_chunk(64))
            finally:
                timer.cancel()
        except duckdb.InterruptException as error:
            raise WanlabError(f"the query took over {SECONDS:.0f} s; select less in {_short(sql)}") from error
        except duckdb.Error as error:
            raise WanlabError(f"the query cannot be answered: {first_line(error)}") from error
        if rows > MOST_ROWS:
            raise WanlabError(
                f"the query gives over {MOST_ROWS:,} rows; add LIMIT or GROUP BY to {_short(sql)}"
            )
        found = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
        words = {name: str for name in found.columns if isinstance(found[name].dtype, pd.CategoricalDtype)}
        return found.astype(words)

    @cached_property
    def _database(self) -> Any:
        settings: dict[str, Any] = {
            "enable_external_access": "false",
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": "4GB",
            "max_temp_directory_size": "0MB",
            "threads": "2",
        }
        database = duckdb.connect(":memory:", config=settings)
        for prefix, view in (("", self), ("other_", self.compare)):
            if view is not None:
                database.register(f"{prefix}events", view.events.frame.rename_axis("row").reset_index())
                database.register(f"{prefix}work", view.events.work.rename_axis("row").reset_index())
                database.register(f"{prefix}stretches", view.events.stretches)
        database.execute("SET lock_configuration = true")
        return database

    def ask(self, question: str) -> pd.DataFrame:
        """The answer to a ready question: a name of `QUESTIONS`, which says what its columns are.

        Raises:
            WanlabError: no such question.
        """
        if question not in QUESTIONS:
            hint = did_you_mean(question, QUESTIONS) or f"; there are {', '.join(QUESTIONS)}"
            raise WanlabError(f"no question {question!r}{hint}")
        return self.query(QUESTIONS[question].sql)

    def changes(self, by: str = "module", **conditions: Any) -> pd.DataFrame:
        """What grew and what shrank from this trace to the second, aligned by module and step.

        A module that one trace does not name, as inside a compiled block, counts as the nearest around it that both name.

        Args:
            by: "module" (path), "part" (the same for all layers and both experts), "category" or "name" (of the kernel).
            conditions: as of `select`. With `between` the second trace is selected by the modules and steps of which at
                least half the time lies in the interval, and so are both sides.

        Returns:
            component, step and `by`; before_ms, after_ms (own time of the work), change_ms; largest change first.

        Raises:
            WanlabError: there is no second trace, or an error of `select`.
        """
        if self.compare is None:
            raise WanlabError("changes needs a second trace: diagnose.explore(trace, compare=other)")
        if by not in ("module", "part", "category", "name"):
            raise WanlabError(f"by is module, part, category or name, not {by!r}")
        between = conditions.pop("between", None)
        sides = []
        names = [set(view.events.frame["module"].cat.categories) for view in (self, self.compare)]
        both = set.intersection(*names)
        shared = {name: _around(name, both) for name in set.union(*names)}
        places = self._places(between, shared) if between is not None else None
        for view in (self, self.compare):
            known = {k: v for k, v in conditions.items() if k != "lane"}
            frame = view.select(**({"side": view.events.side} | known))
            frame = frame.assign(module=frame["module"].astype(str).map(shared))
            if places is not None:
                keys = pd.MultiIndex.from_arrays([frame["step"], frame["module"]])
                frame = frame[keys.isin(places)]
            sides.append(_summed(frame, by))
        table = pd.concat(sides, axis=1, keys=["before_ms", "after_ms"]).fillna(0.0)
        table["change_ms"] = table["after_ms"] - table["before_ms"]
        order = table["change_ms"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index()

    def _places(self, between: tuple[float, float], shared: dict[str, str]) -> pd.MultiIndex:
        """Step and shared module of which at least half the work's time lies between two moments."""
        inside, work = self.select(side=self.events.side, between=between), self.events.work
        part, whole = (
            frame[time].groupby([frame["step"], frame["module"].astype(str).map(shared)]).sum()
            for frame, time in ((inside, "inside_us"), (work, "own_us"))
        )
        return part.index[(part >= 0.5 * whole.reindex(part.index)).to_numpy()]

    def answer(self, caveat: str = "", recorded: str | None = None) -> Answer:
        """What the ready questions found, for a reader who has ten seconds.

        Args:
            caveat: sentence that stands first below the headline.
            recorded: file that the trace was read from; None where it was captured in this run.
        """
        work = self.events.work
        spent, what = work["own_us"].sum() / 1e3, "GPU" if self.events.side == GPU else "host"
        loss, gaps, loose = (self.ask(name) for name in ("far_from_roofline", "longest_gaps", "not_fused"))
        copies = self.ask("largest_copies")
        known = work[work["roofline_us"] > 0]
        lost = (known["own_us"] - known["roofline_us"]).clip(lower=0)
        by_category = lost.groupby(known["category"], observed=True).sum().sort_values(ascending=False) / 1e3
        longest = gaps["gap_us"].max() / 1e3 if len(gaps) else 0.0
        if len(by_category) and by_category.iloc[0] > 0:
            most = with_article(category_name(str(by_category.index[0]), self.joint))
            head = (
                f"Most time is lost in {most}: {time_text(by_category.iloc[0])} of the {what}'s {time_text(spent)} lie above"
                f" the roofline of the same work. Over all work with known shapes it is {time_text(lost.sum() / 1e3)}."
            )
        else:
            head = (
                f"The {what} worked for {time_text(spent)}, and its longest pause was {time_text(longest)}. How far its work"
                " is from the roofline is not known: the device has no recorded ceilings."
            )
        following = NEXT.get(str(by_category.index[0]), RANKS) if len(by_category) else RANKS
        if recorded is not None:
            following = step("ranks what to change by this profile", "15_triage", trace=recorded)
        covered = 100 * known["own_us"].sum() / 1e3 / spent if spent else 0.0
        return answer(
            head,
            caveat,
            f"Shapes and ceilings are known for {percent_text(covered)} of that time; the roofline is a bound, and no kernel"
            " reaches all of it. One profiled generation, so noise is not known.",
            next=following,
            tiles=(
                (f"{what} works", time_text(spent), f"{len(work):,} events"),
                ("above the roofline", time_text(lost.sum() / 1e3), "all work with known shapes")
                if len(loss)
                else None,
                ("longest pause", time_text(longest), "nothing runs"),
                (
                    "largest copies",
                    size_text(copies["moved_bytes"].iloc[0]),
                    f"{copies['copies'].iloc[0]:,} of one kind",
                )
                if len(copies)
                else None,
                ("not fused", time_text(loose["saves_ms"].sum()), "saved at most, largest twelve")
                if len(loose)
                else None,
            ),
        )


LAYER = re.compile(r"\.\d+(?=\.|$)")
SEARCHED = ("name", "module", "shapes")


def explore(trace: Trace, compare: Trace | None = None, *, ceilings: Ceilings | None = None) -> Exploration:
    """Open a trace for exploration: selections, SQL, ready questions; `plots.explorer` draws it.

    Args:
        compare: a second trace, taken after a change; aligned by module and step.
        ceilings: of the traced device; those recorded for its name if not given.
    """
    roof = ceilings or (recorded_ceilings(trace.device_name) if trace.device_name else None)
    if compare is None:
        return Exploration(trace, roof)
    theirs = recorded_ceilings(compare.device_name) if compare.device_name else roof
    return Exploration(trace, roof, Exploration(compare, ceilings or theirs))


def _around(module: str, known: Collection[str]) -> str:
    """The module itself or the nearest around it that is known; "" without one."""
    while module and module not in known:
        module = module.rpartition(".")[0]
    return module


def _several(value: Any) -> Collection[Any]:
    return [value] if isinstance(value, str | int | np.integer) else list(value)


def _by_category(column: pd.Series, marked: list[bool]) -> np.ndarray:
    """Whether each row has one of the marked categories."""
    return np.array([*marked, False], dtype=bool)[column.cat.codes.to_numpy()]


def _summed(frame: pd.DataFrame, by: str) -> pd.Series:
    """Own time in ms by component, step and `by`."""
    if by == "part":
        parts = frame["module"].astype(str).str.replace(r"^expert_(high|low)", "expert", regex=True)
        frame = frame.assign(part=parts.str.replace(r"\.\d+", ".*", regex=True))
    keys = ["step", by] if by == "part" else ["component", "step", by]
    strings = {key: frame[key].astype(str) for key in keys if key != "step"}
    return frame.assign(**strings).groupby(keys)["own_us"].sum() / 1e3


def _short(sql: str) -> str:
    text = " ".join(str(sql).split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
