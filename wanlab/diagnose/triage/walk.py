"""Walks the decision tree of triage (tree.json) with the measurements of saved runs.

A question compares a measurement with thresholds, or takes the largest of several shares; its branch leads to another
question or to advice. A missing measurement stops only its own root, and the result names the notebook that measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from wanlab.diagnose.triage.tree import (
    Advice,
    Measurement,
    RunMeasurements,
    Tree,
    amdahl,
    number,
    read_tree,
    shown,
)

NOISE, TIMES = "baseline.noise_percent", ("baseline.time", "breakdown.")
ASKED = ["root", "node", "question", "state", "what", "value", "unit", "reads", "threshold", "branch", "to"]
ASKED += ["source", "notebook", "command"]
ADVISED = ["root", "node", "advice", "share_percent", "bound_ratio", "bound", "hazard", "mitigation", "help"]
ADVISED += ["evidence", "notebook"]


@dataclass(frozen=True)
class Triage:
    """The result of a walk through `tree`.

    Attributes:
        frame: one row per question, in order: root, node, question, state (measured, unknown, not applicable), what, value,
            unit, reads (the value as text), threshold, branch, to, source, notebook and command (that measure it).
        advice: one row per advice that was reached: root, node, advice, share_percent, bound_ratio and bound (the largest
            speed-up, by Amdahl), hazard, mitigation, help, evidence, notebook.
    """

    tree: Tree
    frame: pd.DataFrame
    advice: pd.DataFrame

    @property
    def commands(self) -> list[str]:
        """Commands that measure what is missing, the most urgent first."""
        return list(dict.fromkeys(self.frame.loc[self.frame["state"] == "unknown", "command"]))

    def row(self) -> dict[str, Any]:
        """Flat record: numbers of measured, unknown and not applicable questions; the advice as advice1, advice2..."""
        states = ("measured", "unknown", "not applicable")
        counts = {state: int((self.frame["state"] == state).sum()) for state in states}
        return counts | {f"advice{i}": name for i, name in enumerate(self.advice["node"], 1)}

    def __str__(self) -> str:
        if not (self.frame["state"] == "measured").any():
            return "Nothing is measured yet. First: " + "; then: ".join(self.commands) + "."
        sentences = []
        for root, questions in self.frame.groupby("root", sort=False):
            known, reached = (
                questions[questions["state"] == "measured"],
                self.advice[self.advice["root"] == root],
            )
            last_value = f": {known['what'].iloc[-1]} {known['reads'].iloc[-1]}" if len(known) else ""
            texts = [
                f"{a.advice}{bound_text(a.bound_ratio, ' (at most {:.2f}x)')}" for a in reached.itertuples()
            ]
            missing = questions.loc[questions["state"] == "unknown", "notebook"].iloc[-1:]
            open_ = "".join(f"unknown until {notebook} is run" for notebook in missing)
            sentences.append(f"{root} {', then '.join(texts) or open_}{last_value}.")
        return " ".join(sentences)


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
    return Triage(tree, pd.DataFrame(questions, columns=ASKED), pd.DataFrame(advice, columns=ADVISED))


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
            branch += f" (a close call: the baseline's noise is {noise:.1f} %)"
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
