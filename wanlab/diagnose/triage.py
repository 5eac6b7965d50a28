"""Triage: the decision tree as data (triage.json), and a walk through it with the measurements of saved runs.

A question compares a measurement with thresholds, or takes the largest of several shares; its branch leads to another
question or to advice. A missing measurement stops only its own root, and the result names the notebook that measures it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from wanlab.core.answer import MOST_TILES, Answer, Step, answer, step
from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.words import counted, listed

DEFAULT = Path(__file__).with_name("triage.json")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Threshold(_Strict, frozen=True):
    """A number that questions compare with."""

    value: float
    unit: str
    what: str


class Quantity(_Strict, frozen=True):
    """A number that `notebook` records under this name, or one computed from others: a sum, a part in percent of a whole, or
    the first known one. `absent` explains why a run of the notebook may not have it."""

    unit: str
    notebook: str
    what: str
    absent: str = ""
    sum: tuple[str, ...] = ()
    percent: tuple[str, ...] = ()
    first: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.sum + self.percent + self.first


class Branch(_Strict, frozen=True):
    """Leads to node `to` where the value is over, or below, the named threshold."""

    to: str
    over: str | None = None
    below: str | None = None


class Question(_Strict, frozen=True):
    """Compares `measurement` in `branches`, or takes the `largest` share (share -> node) if it reaches `threshold`; else
    leads to `otherwise`. `absent` is the next node where the number cannot exist, `unknown` where it was not measured."""

    question: str
    otherwise: str
    measurement: str | None = None
    branches: tuple[Branch, ...] = ()
    largest: dict[str, str] = {}
    threshold: str | None = None
    absent: str | None = None
    unknown: str | None = None

    @property
    def limits(self) -> list[str]:
        """Names of its thresholds."""
        return [t for t in (self.threshold, *(t for b in self.branches for t in (b.over, b.below))) if t]

    @property
    def leads_to(self) -> list[str]:
        nodes = [
            *(b.to for b in self.branches),
            *self.largest.values(),
            self.otherwise,
            self.absent,
            self.unknown,
        ]
        return [node for node in dict.fromkeys(nodes) if node]


class Advice(_Strict, frozen=True):
    """What to do, and the `notebook` with the `parameters` that shows its gain. `share` names what it can reduce, by the
    part `removes`; measurements in `also` are shown as evidence."""

    advice: str
    hazard: str
    mitigation: str
    help: str
    notebook: str | None = None
    parameters: dict[str, Any] = {}
    share: str | None = None
    removes: float = 1.0
    also: tuple[str, ...] = ()
    to: str | None = None

    @property
    def leads_to(self) -> list[str]:
        return [self.to] if self.to else []


@dataclass(frozen=True)
class Measurement:
    """One number and its source; `value` is None if it is missing, and `note` then explains why, if known."""

    value: float | None
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class RunMeasurements:
    """Measurements of saved runs; `runs.run_measurements` collects them.

    Attributes:
        measured: measurements by name.
        used, refused: tables of the runs that are used, and of those that are refused, with `why`.
        parameters: parameters of notebooks that measure the same model in the same way.
        output: folder of new runs in the proposed commands; "" is the usual one.
        notes: cautions for the reader.
    """

    measured: dict[str, Measurement] = field(default_factory=dict)
    used: pd.DataFrame | None = None
    refused: pd.DataFrame | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """Options of a command that measures the same model in the same way."""
        output = f" --output {shlex.quote(self.output)}" if self.output else ""
        return output + "".join(f" -p {name}={shlex.quote(str(v))}" for name, v in self.parameters.items())


@dataclass(frozen=True)
class Tree:
    """A decision tree that passed all checks; made by `read_tree`."""

    where: str
    roots: dict[str, str]
    thresholds: dict[str, Threshold]
    measurements: dict[str, Quantity]
    questions: dict[str, Question]
    advice: dict[str, Advice]

    @property
    def nodes(self) -> dict[str, Question | Advice]:
        return {**self.questions, **self.advice}

    def edges(self, node: str) -> dict[str, str]:
        """The next nodes of a node, each with its condition as text: "> 80 %", "between", "n/a"."""
        item = self.nodes[node]
        if isinstance(item, Advice):
            return dict.fromkeys(item.leads_to, "")
        limits = [(b, self.thresholds[b.over or b.below]) for b in item.branches]
        pairs = [(b.to, f"{'>' if b.over else '<'} {shown(t.value, t.unit)}") for b, t in limits]
        rest = "between" if item.branches else ""
        if len(limits) == 1:
            rest = f"{'≤' if limits[0][0].over else '≥'} {shown(limits[0][1].value, limits[0][1].unit)}"
        pairs += [*((to, "") for to in item.largest.values()), (item.otherwise, rest)]
        pairs += [(item.absent, "n/a"), (item.unknown, "unknown")]
        edges: dict[str, str] = {}
        for to, label in pairs:
            if to:
                edges.setdefault(to, label)  # of several edges to one node, the first gives the label
        return edges

    def quantity(self, name: str, measured: Mapping[str, Measurement]) -> Measurement:
        """A measurement by name: recorded, or computed from others."""
        recorded = measured.get(name, Measurement(None))
        if recorded.value is not None:
            return recorded
        quantity, value = self.measurements[name], None
        parts = [self.quantity(part, measured) for part in quantity.parts]
        if quantity.first:
            parts = [part for part in parts if part.value is not None][:1]
        if parts and all(part.value is not None for part in parts):
            value = sum(part.value for part in parts)
            if quantity.percent:
                value = 100 * parts[0].value / parts[1].value if parts[1].value > 0 else None
        if number(value) is not None:  # infinity minus infinity is not a number
            return Measurement(value, ", ".join(dict.fromkeys(part.source for part in parts if part.source)))
        beside = [item for n, item in measured.items() if self._notebook(n) == quantity.notebook]
        was_run = any(item.value is not None for item in beside)
        return Measurement(None, note=recorded.note or (quantity.absent if was_run else ""))

    def _notebook(self, name: str) -> str | None:
        return self.measurements[name].notebook if name in self.measurements else None

    def having(self, thresholds: Mapping[str, float]) -> Tree:
        """The same tree with other values of some thresholds.

        Raises:
            WanlabError: unknown name, not a finite number, or a question whose branches would overlap.
        """
        changed = dict(self.thresholds)
        for name, value in thresholds.items():
            if name not in changed:
                hint = did_you_mean(name, changed) or f"; it has {', '.join(changed)}"
                raise WanlabError(f"unknown threshold {name!r} of {self.where}{hint}")
            number_given = number(value)
            if number_given is None or math.isinf(number_given):
                raise WanlabError(f"threshold {name!r} wants a number in {changed[name].unit}, got {value!r}")
            changed[name] = msgspec.structs.replace(changed[name], value=number_given)
        return _sound(replace(self, thresholds=changed))


def read_tree(path: str | None = None) -> Tree:
    """A decision tree from a JSON file, by default the one that comes with wanlab.

    Raises:
        WanlabError: unreadable file; unknown key or wrong type; a branch to an unknown node; a cycle; a node that no root
            reaches; an unknown measurement or threshold, or two of different units compared. The message names the node.
    """
    where = Path(path).name if path else DEFAULT.name
    try:
        parts = msgspec.json.decode(Path(path or DEFAULT).read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise WanlabError(f"cannot read the tree {path}: {reason}") from None
    kinds = {
        "roots": str,
        "thresholds": Threshold,
        "measurements": Quantity,
        "questions": Question,
        "advice": Advice,
    }
    if odd := set(parts) ^ set(kinds):
        raise WanlabError(
            f"{where} wants the parts {', '.join(kinds)}; missing or unknown: {', '.join(sorted(odd))}"
        )
    sections: dict[str, dict[str, Any]] = {}
    for part, kind in kinds.items():
        sections[part] = {}
        for name, value in parts[part].items():
            try:
                sections[part][name] = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise WanlabError(f"{where}, {part}, {name!r}: {error}") from None
    return _sound(Tree(where, **sections))


def _sound(tree: Tree) -> Tree:
    """The tree, after a check that every walk through it ends in advice for any measurements."""

    def refuse(node: str, why: str) -> None:
        raise WanlabError(f"{tree.where}, {node!r}: {why}")

    def known(node: str, names: Iterable[str], among: Mapping[str, Any], what: str) -> None:
        for name in names:
            if name not in among:
                refuse(node, f"unknown {what} {name!r}{did_you_mean(name, among)}")

    for name, quantity in tree.measurements.items():
        ways = [way for way in (quantity.sum, quantity.percent, quantity.first) if way]
        known(name, quantity.parts, tree.measurements, "measurement")
        if len(ways) > 1 or len(quantity.percent) not in (0, 2):
            refuse(name, "wants one of sum, percent (of part and whole) and first")
    parts = {name: [*q.parts] for name, q in tree.measurements.items()}
    _without_cycle(parts, parts, refuse)
    if both := set(tree.questions) & set(tree.advice):
        refuse(min(both), "is a question and an advice; give one of them another name")
    for node, item in tree.nodes.items():
        known(node, item.leads_to, tree.nodes, "node")
    for node, q in tree.questions.items():
        if bool(q.measurement) == bool(q.largest) or bool(q.branches) == bool(q.largest):
            refuse(node, "wants a measurement with branches, or largest with a threshold")
        if bool(q.threshold) != bool(q.largest) or any(bool(b.over) == bool(b.below) for b in q.branches):
            refuse(node, "wants one threshold per branch (over or below), or one threshold for the largest")
        names = [*q.largest] or [q.measurement]
        known(node, names, tree.measurements, "measurement")
        known(node, q.limits, tree.thresholds, "threshold")
        units = {tree.measurements[n].unit for n in names} | {tree.thresholds[t].unit for t in q.limits}
        if len(units) > 1:
            refuse(node, f"compares different units: {', '.join(sorted(units))}")
        over = [tree.thresholds[b.over].value for b in q.branches if b.over]
        below = [tree.thresholds[b.below].value for b in q.branches if b.below]
        if over and below and max(below) > min(over):
            refuse(
                node,
                f"below {max(below):g} and over {min(over):g} overlap; the lower threshold goes to below",
            )
    for node, advice in tree.advice.items():
        known(node, filter(None, (advice.share, *advice.also)), tree.measurements, "measurement")
        if not 0 < advice.removes <= 1 or (advice.share and tree.measurements[advice.share].unit != "%"):
            refuse(node, "wants a share in % and a part of it to be removed, over 0 and at most 1")
    known("roots", tree.roots.values(), tree.nodes, "node")
    reached = _without_cycle(
        {n: item.leads_to for n, item in tree.nodes.items()}, tree.roots.values(), refuse
    )
    for node in tree.nodes:
        if node not in reached:
            refuse(node, "no root leads here")
    return tree


def _without_cycle(leads_to: Mapping[str, list[str]], starts: Iterable[str], refuse: Any) -> set[str]:
    """All nodes that can be reached from the starts; refuses the first node that leads back to itself."""
    visited: set[str] = set()
    for start in starts:
        path = [(start, iter(leads_to[start]))]
        while path:
            node = next(path[-1][1], None)
            if node is None:
                visited.add(path.pop()[0])
            elif node in [above for above, _ in path]:
                refuse(node, "leads back to itself")
            elif node not in visited:
                path.append((node, iter(leads_to[node])))
    return visited


def number(value: Any) -> float | None:
    """A real number as a float (beyond its range: infinity); None for anything else, including NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return None if math.isnan(value) else value


def shown(value: float, unit: str) -> str:
    """A number with its unit, short enough for a box in a figure."""
    return f"{value:,.0f} {unit}" if 100 <= abs(value) < 1e9 else f"{value:.4g} {unit}"


def amdahl(share_percent: float | None, removes: float = 1.0) -> float | None:
    """The largest speed-up from removing a part of a share, as a ratio; None where it has no bound.

    1 / (1 - p) of Amdahl, "Validity of the single processor approach", AFIPS 1967, if the removed part p costs nothing.
    """
    if share_percent is None or not 0 <= share_percent <= 100 or removes * share_percent == 100:
        return None
    return 1 / (1 - removes * share_percent / 100)


NOISE, TIMES = "baseline.noise_percent", ("baseline.time", "breakdown.")
CLOSE, CLEAR_RATIO = "a close call", 2.0
ASKED = ["root", "node", "question", "state", "what", "value", "unit", "reads", "threshold", "branch", "to"]
ASKED += ["source", "notebook", "command"]
ADVISED = ["root", "node", "advice", "share_percent", "bound_ratio", "bound", "hazard", "mitigation", "help"]
ADVISED += ["evidence", "notebook"]
RANKED = ["what", "advice", "share_percent", "bound_ratio", "reached", "threshold_percent"]


@dataclass(frozen=True)
class Triage:
    """The result of a walk through `tree`.

    Attributes:
        frame: one row per question, in order: root, node, question, state (measured, unknown, not applicable), what, value,
            unit, reads (the value as text), threshold, branch, to, source, notebook and command (that measure it).
        advice: one row per advice that was reached: root, node, advice, share_percent, bound_ratio and bound (the largest
            speed-up, by Amdahl), hazard, mitigation, help, evidence, notebook.
        ranking: every measured share of the time among which the tree takes the largest, largest first: what, advice,
            share_percent, bound_ratio, reached (whether its advice was), threshold_percent. Empty without a profile.
        parameters: as `RunMeasurements.parameters`.
    """

    tree: Tree
    frame: pd.DataFrame
    advice: pd.DataFrame
    ranking: pd.DataFrame
    parameters: Mapping[str, Any]

    @property
    def commands(self) -> list[str]:
        """Commands that measure what is missing, the most urgent first."""
        return self._missing("command")

    def _missing(self, column: str) -> list[str]:
        return list(dict.fromkeys(self.frame.loc[self.frame["state"] == "unknown", column]))

    def row(self) -> dict[str, Any]:
        """Flat record: numbers of measured, unknown and not applicable questions; the advice as advice1, advice2..."""
        states = ("measured", "unknown", "not applicable")
        counts = {state: int((self.frame["state"] == state).sum()) for state in states}
        return counts | {f"advice{i}": name for i, name in enumerate(self.advice["node"], 1)}

    @property
    def sentences(self) -> list[str]:
        """For each root the advice that was reached, and the number that decided; or what has to be measured."""
        said = []
        for root, questions in self.frame.groupby("root", sort=False):
            known, reached = (
                questions[questions["state"] == "measured"],
                self.advice[self.advice["root"] == root],
            )
            last_value = f": {_said(known.iloc[-1])}" if len(known) else ""
            texts = [
                f"{a.advice}{bound_text(a.bound_ratio, ' (at most {:.2f} times as fast)')}"
                for a in reached.itertuples()
            ]
            missing = questions.loc[questions["state"] == "unknown", "notebook"].iloc[-1:]
            open_ = "".join(f"unknown until {notebook} is run" for notebook in missing)
            said.append(f"{root} {', then '.join(texts) or open_}{last_value}.")
        return said

    def answer(self, caveat: str = "") -> Answer:
        """What to change first and the most that it can gain; where nothing is measured, what to measure first.

        Args:
            caveat: sentence about a profile that was read in place of saved runs.
        """
        counts, asked = self.row(), len(self.frame)
        questions = (
            "questions answered",
            f"{counts['measured']} of {asked}",
            f"{counts['unknown']} not measured yet",
        )
        tiles = [questions, ("advice", f"{len(self.advice)}", "what the measured numbers lead to")]
        if self.commands:
            tiles.append(("still to measure", counted(len(self.commands), "notebook"), "commands below"))
        if not counts["measured"]:
            head = "Nothing is measured yet, so nothing can be advised. Measure what one video costs first."
            rest = self._missing("notebook")[1:]
            then = (
                f"Then run {listed(rest)}, and this notebook again; the commands are below." if rest else ""
            )
            return answer(head, caveat, then, next=self._next(None), tiles=tuple(tiles))
        slow = self.advice["root"] == self.frame["root"].iloc[0]
        sized = self.advice[self.advice["share_percent"].notna() & slow]
        best = None
        if len(sized):
            best = sized.loc[sized["share_percent"].idxmax()]
            what = self.tree.measurements[self.tree.advice[best["node"]].share].what.removeprefix("share of ")
            share = f"{best['share_percent']:.0f} %"
            head = f"Change first: {best['advice']}. {share} of the time goes to {what}"
            bound = bound_text(best["bound_ratio"], ", so a video becomes at most {:.2f} times as fast")
            head += f"{bound}.{self._certainty(best['node'])}"
            gain = bound_text(best["bound_ratio"], "≤ {:.2f}×") or "no bound"
            tiles = [("largest gain", gain, best["advice"]), ("share", share, f"of the time: {what}"), *tiles]
        elif slow.any():
            head = self.sentences[0]
        else:
            head = "What to change for speed is not known yet: the number that decides it is not measured."
        return answer(
            head, caveat, " ".join(self.sentences), next=self._next(best), tiles=tuple(tiles[:MOST_TILES])
        )

    def _certainty(self, node: str) -> str:
        """How sure it is that the advice `node` is the first, as a sentence."""
        leading = self.frame[self.frame["to"] == node]
        if leading["branch"].str.contains(CLOSE, regex=False).any():
            return " It is a close call: noise could turn it."
        shares = self.ranking["share_percent"].tolist()
        if len(shares) > 1 and self.ranking["reached"].iloc[0]:
            clear = "That is clear: the" if shares[0] > CLEAR_RATIO * shares[1] else "The"
            return f" {clear} second largest share is {shares[1]:.0f} %."
        return ""

    def _next(self, best: pd.Series | None) -> Step:
        """What to do next: the notebook that acts on the first advice, else the first measurement that is missing."""
        if best is not None and best["notebook"]:
            given = dict(self.parameters) | self.tree.advice[best["node"]].parameters
            return step("shows what that gains", str(best["notebook"]), **given)
        missing = self._missing("notebook")
        if not missing:
            return step("tries engines and plans together, within a limit on quality loss", "60_sweep")
        first = missing[0] == "10_baseline"
        why = "measures what one video costs" if first else "measures the number that decides next"
        return step(why, missing[0], **self.parameters)


def _said(row: pd.Series) -> str:
    """A measured number as a sentence has it: a share in whole percent."""
    whole = row["unit"] == "%" and abs(row["value"]) >= 1
    return f"{row['what']} {row['value']:.0f} %" if whole else f"{row['what']} {row['reads']}"


def triage(measured: RunMeasurements | Mapping[str, Any], tree: Tree | None = None) -> Triage:
    """Walk all roots of a tree; every node is visited at most once.

    Args:
        measured: from `runs.run_measurements`, or numbers by name; a value that is not a number counts as not measured.
        tree: from `read_tree`, with `Tree.having` for other thresholds; the default tree if not given.
    """
    tree = tree or read_tree()
    if not isinstance(measured, RunMeasurements):
        measured = RunMeasurements({name: _given(value) for name, value in measured.items()})
    questions, advice, visited = [], [], set()
    for root, node in tree.roots.items():
        while node and node not in visited:
            visited.add(node)
            row = {"root": root, "node": node}
            if node in tree.questions:
                questions.append(row | _ask(tree, node, measured))
                node = questions[-1]["to"]
            else:
                advice.append(row | _advise(tree, tree.advice[node], measured.measured))
                node = tree.advice[node].to
    asked, advised = pd.DataFrame(questions, columns=ASKED), pd.DataFrame(advice, columns=ADVISED)
    return Triage(tree, asked, advised, _ranking(tree, measured.measured, visited), measured.parameters)


def _ranking(tree: Tree, measured: Mapping[str, Measurement], visited: set[str]) -> pd.DataFrame:
    """All shares of the time that the tree compares: of the question that was asked, else of the first with any known."""
    first = next(iter(tree.roots.values()), None)
    below = (
        _without_cycle({n: item.leads_to for n, item in tree.nodes.items()}, [first], str) if first else set()
    )
    questions = [node for node in tree.questions if node in below and tree.questions[node].largest]
    rows: list[dict[str, Any]] = []
    for node in sorted(questions, key=lambda node: node not in visited):
        question = tree.questions[node]
        for name, to in question.largest.items() if not rows else ():
            share = tree.quantity(name, measured).value
            if share is not None:
                advice = tree.advice.get(to)
                rows.append(
                    {
                        "what": tree.measurements[name].what.removeprefix("share of "),
                        "advice": advice.advice if advice else "",
                        "share_percent": share,
                        "bound_ratio": amdahl(share, advice.removes if advice else 1.0),
                        "reached": to in visited,
                        "threshold_percent": tree.thresholds[question.threshold].value,
                    }
                )
    return pd.DataFrame(rows, columns=RANKED).sort_values("share_percent", ascending=False, ignore_index=True)


def bound_text(ratio: float | None, form: str = "at most {:.2f}x") -> str:
    """A bound as text, empty where there is none."""
    return form.format(ratio) if number(ratio) is not None else ""


def _given(value: Any) -> Measurement:
    if isinstance(value, Measurement):
        return value if number(value.value) is not None else Measurement(None, value.source, value.note)
    return Measurement(number(value), "given")


def _ask(tree: Tree, node: str, saved: RunMeasurements) -> dict[str, Any]:
    """Answer one question: its measurement, its thresholds and the next node."""
    question, labels = tree.questions[node], tree.edges(node)
    names = [*question.largest] or [question.measurement]
    measurements = {name: tree.quantity(name, saved.measured) for name in names}
    known = {name: item for name, item in measurements.items() if item.value is not None}
    ranked = sorted(known, key=lambda name: -known[name].value)
    name = (ranked or names)[0]
    item, quantity = measurements[name], tree.measurements[name]
    limits = [(b, tree.thresholds[b.over or b.below].value) for b in question.branches]
    texts = [f"{'over' if b.over else 'below'} {shown(limit, quantity.unit)}" for b, limit in limits]
    thresholds = [limit for _, limit in limits]
    if question.largest:
        thresholds = [tree.thresholds[question.threshold].value]
        of = f"{len(known)} known" if 0 < len(known) < len(names) else len(names)
        texts = [f"the largest of {of}, at least {shown(thresholds[0], quantity.unit)}"]
    state, reads, to = "measured", "", question.otherwise
    if not known:
        state = "not applicable" if item.note else "unknown"
        reads, to = item.note or "not measured", question.absent if item.note else question.unknown
    elif question.largest:
        to = question.largest[name] if item.value >= thresholds[0] else question.otherwise
    else:
        reached = [b.to for b, limit in limits if (item.value > limit if b.over else item.value < limit)]
        to = (*reached, question.otherwise)[0]
    branch = labels.get(to, state) if state == "measured" else state
    if question.largest and known:
        branch = quantity.what if to != question.otherwise else "none is large"
    noise = saved.measured.get(NOISE, Measurement(None)).value
    if known and noise and name.startswith(TIMES):
        rivals = [known[other].value for other in ranked[1:2]] + thresholds
        if any(abs(item.value - rival) < noise / 100 * abs(rival) for rival in rivals):
            branch += f" ({CLOSE}: the baseline's noise is {noise:.1f} %)"
    return {
        "question": question.question,
        "state": state,
        "what": quantity.what if known or question.measurement else "",
        "value": item.value,
        "unit": quantity.unit,
        "reads": reads or shown(item.value, quantity.unit),
        "threshold": ", ".join(texts),
        "branch": branch,
        "to": to or "",
        "source": item.source,
        "notebook": quantity.notebook,
        "command": f"wanlab run notebooks/{quantity.notebook}.ipynb{saved.options}",
    }


def _advise(tree: Tree, advice: Advice, measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """One advice with its bound and further measurements as evidence."""
    share = tree.quantity(advice.share, measured).value if advice.share else None
    bound, evidence = amdahl(share, advice.removes), []
    for name in filter(None, (advice.share, *advice.also)):
        item, quantity = tree.quantity(name, measured), tree.measurements[name]
        if item.value is not None:
            evidence.append(f"{quantity.what} {shown(item.value, quantity.unit)}")
    noise = measured.get(NOISE, Measurement(None)).value
    if bound and noise and advice.share.startswith(TIMES) and 100 * (bound - 1) < noise:
        evidence.append(f"the bound is within the baseline's noise of {noise:.1f} %")
    texts = {name: getattr(advice, name) for name in ("advice", "hazard", "mitigation", "help")}
    more = {
        "share_percent": share,
        "bound_ratio": bound,
        "bound": bound_text(bound),
        "evidence": "; ".join(evidence),
    }
    return texts | more | {"notebook": advice.notebook or ""}
