"""What a plan can buy at best, said before any work is spent; and what the search for one costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.selection.costs import DEFAULT, counted_only

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.calibrations.recording import Recording


@dataclass(frozen=True)
class AmdahlBound:
    """Amdahl's bound on precision (AFIPS 1967): only linear layers of experts become faster.

    Attributes:
        share_percent: of a generation that they take. source: how that is known.
        infinite: speed-up of the generation if they cost nothing.
        format: the one in which they take the least together. rate: of their time as loaded over that in it.
        at_format: speed-up of the generation if all of them were in it.
        counted: the rate is of counted operations over nominal rates, as nothing was timed here.
    """

    share_percent: float
    source: str
    infinite: float
    format: str
    rate: float
    at_format: float
    counted: bool

    def of(self, rate: float) -> float:
        """Speed-up of the generation when the linear layers are so many times as fast."""
        return speedup(self.share_percent, rate)

    def row(self) -> dict[str, Any]:
        """One table row."""
        return asdict(self)

    def __str__(self) -> str:
        how = "by nominal rates, counted and not timed" if self.counted else "as timed here"
        return (
            f"linear layers of the experts take {self.share_percent:.1f} % of a generation ({self.source}): without them"
            f" it would be {self.infinite:.2f}x as fast, with all of them in {self.format} {self.at_format:.2f}x (they alone"
            f" {self.rate:.2f}x, {how})"
        )


def amdahl_bound(costs: pd.DataFrame, share: Any, *, schedule: Any = None) -> AmdahlBound:
    """The bound of any plan, from the share of linear layers and what they cost in each format.

    Args:
        costs: from `layer_costs`.
        share: percent of a generation; or a `Breakdown` of one (`wanlab.diagnose.breakdown`), whose rows of linear layers in
            experts are taken.
        schedule: components of the steps (`model.schedule(steps)["component"]`); experts count alike if not given.

    Raises:
        WanlabError: a share outside 0 to 100, or no format to compare.
    """
    if hasattr(share, "parts"):
        parts = share.parts
        experts = parts["component"].astype(str).str.startswith("expert")
        rows = parts[experts & (parts["category"] == "linear")]
        percent, source = 100 * float(rows["time_ms"].sum()) / share.wall_ms, "from a profile"
    else:
        percent, source = float(share), "as given"
    if not 0 <= percent <= 100:
        raise WanlabError(f"a share of {percent:.4g} % is none; give 0 to 100")
    counted = counted_only(costs)
    calls = dict.fromkeys(costs["component"], 1) if schedule is None else dict(_called(schedule))
    spent = costs.assign(
        spent=costs["work_gflop" if counted else "time_ms"] * costs["component"].map(calls).fillna(0)
    )
    default = spent[spent["format"] == DEFAULT].set_index(["component", "layer"])["spent"]
    rates = {}
    for name in dict.fromkeys(spent.loc[spent["format"] != DEFAULT, "format"]):
        own = spent[spent["format"] == name].set_index(["component", "layer"])["spent"]
        # Layers that cannot be in the format stay as they are.
        rates[name] = float(default.sum() / own.reindex(default.index).fillna(default).sum())
    if not rates:
        raise WanlabError(
            "these costs have no format but the default; name some in layer_costs(model, formats)"
        )
    best = max(rates, key=lambda name: rates[name])
    infinite = speedup(percent, float("inf"))
    return AmdahlBound(percent, source, infinite, best, rates[best], speedup(percent, rates[best]), counted)


def speedup(share_percent: float, rate: float) -> float:
    """Of the whole, when a share of it becomes so many times as fast."""
    left = 1 - share_percent / 100 + (share_percent / 100 / rate if rate != float("inf") else 0)
    return float("inf") if left <= 0 else 1 / left


def _called(schedule: Any) -> dict[str, int]:
    """How often every component is called."""
    from collections import Counter

    return Counter(str(name) for name in schedule)


@dataclass(frozen=True)
class SearchCost:
    """Expert forwards that a plan took to find, beside those of brute force.

    Attributes:
        recording, sensitivity, generations: forwards of recording and calibration, of the sensitivity (gradients as two
            forwards each, products of layers as what they are), and of generations to verify by.
        brute_force: layers x formats x cases x calls of a generation, and the originals: every layer in every format by
            itself measured end to end on the same cases.
        formula: the same in words.
    """

    recording: float
    sensitivity: float
    generations: float
    brute_force: float
    formula: str

    @property
    def forwards(self) -> float:
        return self.recording + self.sensitivity + self.generations

    @property
    def percent(self) -> float:
        return 100 * self.forwards / self.brute_force

    def row(self) -> dict[str, Any]:
        """One table row."""
        return {
            "recording_forwards": self.recording,
            "sensitivity_forwards": self.sensitivity,
            "generation_forwards": self.generations,
            "forwards": self.forwards,
            "brute_force_forwards": self.brute_force,
            "percent_of_brute_force": self.percent,
            "formula": self.formula,
        }

    def __str__(self) -> str:
        brute = f"{self.formula} = {self.brute_force:,.0f}"
        return f"{self.forwards:,.0f} forwards, {self.percent:.1f} % of brute force ({brute})"


def search_cost(
    sensitivity, recording: Recording | None, originals, generations: int, *, calibrated: bool = True
) -> SearchCost:
    """What was spent.

    Args:
        sensitivity: a `Sensitivity`. recording: its recording, made and calibrated on for this.
        originals: from `make_originals`; what they took is counted too.
        generations: cases generated with plans, decoded or not.
        calibrated: whether the recording was also passed once for its ranges.
    """
    frame = sensitivity.frame
    layers = len(frame.drop_duplicates(["component", "layer"]))
    formats = frame["format"].nunique()
    cases, calls = len(originals.made), originals.batched.calls
    recorded = len(recording.calls) * (1 + calibrated) if recording is not None else 0
    brute = (layers * formats + 1) * cases * calls
    return SearchCost(
        recording=recorded,
        sensitivity=float(sensitivity.costs()["forward_equivalents"].iloc[0]),
        generations=originals.forwards + generations * calls,
        brute_force=brute,
        formula=f"({layers} layers x {formats} formats + 1) x {cases} cases x {calls} calls",
    )
