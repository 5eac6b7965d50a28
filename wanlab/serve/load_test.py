"""A load test: throughput and latency of a service with batches and without, and what batching could buy at most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.measure.in_turn import InTurn, until_told
from wanlab.measure.timing import Comparison
from wanlab.models.batches import generate_together, why_alone
from wanlab.serve.load import Reply, arrivals, body_of, send
from wanlab.serve.running import Served

if TYPE_CHECKING:
    from wanlab.diagnose.breakdown import Breakdown
    from wanlab.models.pipeline import Model

ALONE, BATCHES = "one at a time", "in batches"
HIDDEN = ("launch_and_idle", "host_device_transfer")
"""Categories of a breakdown that a batch shares between its videos."""


@dataclass(frozen=True, eq=False)
class BatchBound:
    """What batching can buy before a request is sent.

    Attributes:
        batch: videos in a batch. shared_percent: part of a video's time that the videos of a batch could share.
        together: videos one after another and all together, timed in turn on the model itself; None where it makes one
            at a time, for the reason `alone`.
    """

    batch: int
    shared_percent: float
    together: Comparison | None
    alone: str = ""

    @property
    def times_faster(self) -> float:
        """Most that a batch can raise throughput by, if only the shared part is paid once."""
        if self.alone:
            return 1.0
        shared = self.shared_percent / 100
        return 1 / (1 - shared + shared / self.batch)

    @property
    def videos_per_min(self) -> float | None:
        """Videos per minute that the model itself makes in batches, with nothing around it."""
        return None if self.together is None else 60e3 * self.batch / self.together.candidate_ms

    def frame(self) -> pd.DataFrame:
        """One row: batch, shared_percent, times_faster_at_most, alone (why there are no batches), and together_ with the
        columns of `Comparison.row`."""
        told = (
            {}
            if self.together is None
            else {f"together_{name}": value for name, value in self.together.row().items()}
        )
        row = {
            "batch": self.batch, "shared_percent": self.shared_percent, "times_faster_at_most": self.times_faster,
            "alone": self.alone,
        }  # fmt: skip
        return pd.DataFrame([row | told])


def batch_bound(
    model: Model, breakdown: Breakdown, asked: Sequence[Mapping[str, Any]], *, limit_s: float | None = None
) -> BatchBound:
    """What a batch of these requests can buy: from where the time of one video goes, and as measured on the model.

    Only what does not grow with the number of videos can be shared: launches, Python and copies between host and device, as
    `breakdown` has them. Kernels that a single video leaves half empty gain more; the measurement includes them.

    Args:
        model: from `wanlab.models.load`. breakdown: of one video of the same size.
        asked: arguments of `Model.generate`, one for each video of the batch. limit_s: time limit of the measurement.
    """
    shared = sum(breakdown.share_percent(name) for name in HIDDEN)
    alone = why_alone(model)
    if alone or len(asked) < 2:
        return BatchBound(len(asked), shared, None, alone)
    calls = {
        ALONE: lambda: [model.generate(**each) for each in asked],
        BATCHES: lambda: list(generate_together(model, list(asked))),
    }
    timed = until_told(calls, rounds=3, precision=10.0, limit_s=limit_s, device=model.device, progress=False)
    return BatchBound(len(asked), shared, timed.comparisons[BATCHES])


@dataclass(frozen=True, eq=False)
class Load:
    """One load, sent to the service in rounds.

    Attributes:
        name: for readers. at_once: callers that wait for their video. per_second: mean arrivals; one of the two is None.
        replies: way -> replies of every round, in order. spans_ms: way -> time from the first request to the last reply.
        timed: both ways in turn; None where there is one way, or where arrivals decide how long it takes.
    """

    name: str
    at_once: int | None
    per_second: float | None
    replies: dict[str, list[list[Reply]]]
    spans_ms: dict[str, list[float]]
    timed: InTurn | None


@dataclass(frozen=True, eq=False)
class LoadTest:
    """Loads of growing size on one service.

    Attributes:
        loads: in the order in which they were sent. batch: videos that the service makes at a time.
        within_s: a video counts as in time within this; None counts all. alone: why there are no batches, or "".
    """

    loads: tuple[Load, ...]
    batch: int
    within_s: float | None
    alone: str

    def requests(self) -> pd.DataFrame:
        """One row per request: load, way, round and the fields of `Reply`."""
        rows = [
            {"load": load.name, "way": way, "round": index}
            | {name: getattr(reply, name) for name in reply.__struct_fields__}
            for load in self.loads
            for way, rounds in load.replies.items()
            for index, replies in enumerate(rounds)
            for reply in replies
        ]
        return pd.DataFrame(rows)

    def frame(self) -> pd.DataFrame:
        """One row per load and way.

        Columns: load, way, callers, arrivals_per_s, requests, completed, refused, failed, videos_per_min (over all rounds),
        in_time_per_min (those within `within_s`), latency_p50_s, latency_p90_s, latency_max_s, latency_p99_s (None below 100
        requests, where it would be the largest), queue_wait_p50_s, mean_batch, encode_ms, denoise_ms, decode_ms, wait_ms
        (medians), peak_memory_mib, speedup, low, high, verdict (of the throughput in batches over one at a time).
        """
        rows = []
        for load in self.loads:
            for way, rounds in load.replies.items():
                replies = [reply for each in rounds for reply in each]
                rows.append(self._row(load, way, replies, sum(load.spans_ms[way])))
        return pd.DataFrame(rows)

    def _row(self, load: Load, way: str, replies: list[Reply], span_ms: float) -> dict[str, Any]:
        done = [reply for reply in replies if reply.status == "completed"]
        latencies = np.array([reply.latency_ms for reply in done]) / 1e3
        in_time = sum(self.within_s is None or latency <= self.within_s for latency in latencies)
        quantiles = np.quantile(latencies, (0.5, 0.9, 0.99, 1)) if len(done) else np.full(4, math.nan)
        gain = load.timed.comparisons.get(way) if load.timed else None
        return {
            "load": load.name,
            "way": way,
            "callers": load.at_once,
            "arrivals_per_s": load.per_second,
            "requests": len(replies),
            "completed": len(done),
            "refused": sum(reply.status == "refused" for reply in replies),
            "failed": sum(reply.status not in ("completed", "refused") for reply in replies),
            "videos_per_min": 60e3 * len(done) / span_ms,
            "in_time_per_min": 60e3 * in_time / span_ms,
            "latency_p50_s": quantiles[0],
            "latency_p90_s": quantiles[1],
            "latency_p99_s": quantiles[2] if len(done) >= 100 else None,
            "latency_max_s": quantiles[3],
            "queue_wait_p50_s": _median(done, "queue_wait_ms") / 1e3,
            "mean_batch": _mean(done, "mean_batch"),
            **{name: _median(done, name) for name in ("encode_ms", "denoise_ms", "decode_ms", "wait_ms")},
            "peak_memory_mib": max(
                (reply.peak_memory_mib for reply in done if reply.peak_memory_mib), default=None
            ),
            "speedup": gain.speedup if gain else None,
            "low": gain.low if gain else None,
            "high": gain.high if gain else None,
            "verdict": gain.verdict if gain else None,
        }

    @property
    def best(self) -> tuple[Load, Comparison] | None:
        """The load of waiting callers whose throughput batches raise most, with its comparison."""
        told = [
            (load, load.timed.comparisons[BATCHES])
            for load in self.loads
            if load.timed and BATCHES in load.timed.comparisons
        ]
        return max(told, key=lambda each: each[1].speedup, default=None)


def size_of(model: Model, **settings: Any) -> tuple[tuple[int, int, int], ...]:
    """The size of some settings as `ServiceSettings.sizes` has it; the model's default where one is None or not given."""
    width, height, frames = (
        settings.get(name) or getattr(model.spec.defaults, name) for name in ("width", "height", "frames")
    )
    return ((width, height, frames),)


def load_test(
    service: Served,
    asked: Sequence[Mapping[str, Any]],
    *,
    callers: Sequence[int] = (1, 2, 4),
    requests: int = 8,
    busy_percents: Sequence[float] = (),
    within_s: float | None = None,
    rounds: int = 3,
    precision: float | None = 10.0,
    limit_s: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LoadTest:
    """Send loads to a service: of callers that wait for their video, then of callers that come at random times.

    Of a service of this process each load is sent with one video at a time and with batches, in turn, so that a drift of the
    machine meets both. A service elsewhere is measured as it is.

    Args:
        service: from `wanlab.serve.served` or `remote`.
        asked: arguments of `Model.generate` that requests are made of, in turn; each request has a seed of its own.
        callers: callers that wait, of each load. requests: requests of a load in one round, at least one per caller.
        busy_percents: for each, requests at random times (a Poisson process) that would keep a service that makes one video
            at a time busy to so many percent.
        within_s: latency within which a video is in time.
        rounds, precision, limit_s: as `wanlab.measure.until_told`, of each load of waiting callers; each round sends a load
            twice each way.
        seed: of the arrival times.

    Raises:
        WanlabError: no request, a number of callers below 1, or no video was completed in a load.
    """
    if not asked or requests < 1 or not callers or min(callers) < 1:
        raise WanlabError("a load test needs cases, requests and callers, at least one of each")
    if any(not 0 < percent <= 1000 for percent in busy_percents):
        raise WanlabError("busy_percents lie above 0 and at most at 1000")
    ways = _ways(service)
    loads: list[Load] = []
    bar = tqdm(total=len(callers) + len(busy_percents), desc="loads", unit="load", disable=not progress)
    _sent(service, ways[-1], _bodies(service, asked, max(callers)), at_once=max(callers))  # warm-up
    for count in callers:
        loads.append(_waiting(service, ways, asked, count, max(requests, count), rounds, precision, limit_s))
        bar.update()
    first = loads[0]
    usual = first.spans_ms[ways[0]]
    per_second = 1e3 * len(first.replies[ways[0]][0]) / float(np.median(usual))
    for percent in busy_percents:
        loads.append(_arriving(service, ways, asked, percent, per_second * percent / 100, requests, seed))
        bar.update()
    bar.close()
    if service.limit is not None:
        service.limit(None)
    return LoadTest(tuple(loads), service.facts.max_batch, within_s, service.facts.alone)


def _ways(service: Served) -> tuple[str, ...]:
    if service.limit is None:
        return (BATCHES,) if service.facts.max_batch > 1 else (ALONE,)
    return (ALONE, BATCHES) if service.facts.max_batch > 1 else (ALONE,)


def _bodies(service: Served, asked: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    return [body_of({**asked[index % len(asked)], "seed": index}, service.facts) for index in range(count)]


def _sent(service: Served, way: str, bodies: Sequence[Mapping[str, Any]], **load: Any) -> list[Reply]:
    if service.limit is not None:
        service.limit(1 if way == ALONE else None)
    replies = send(service, bodies, **load)
    if not any(reply.status == "completed" for reply in replies):
        raise WanlabError(f"the service completed none of {len(replies)} requests: {replies[0].error}")
    return replies


def _span_ms(replies: Sequence[Reply]) -> float:
    return max(reply.sent_ms + reply.latency_ms for reply in replies) - min(
        reply.sent_ms for reply in replies
    )


def _waiting(
    service: Served,
    ways: Sequence[str],
    asked: Sequence[Mapping[str, Any]],
    count: int,
    requests: int,
    rounds: int,
    precision: float | None,
    limit_s: float | None,
) -> Load:
    bodies = _bodies(service, asked, requests)
    replies: dict[str, list[list[Reply]]] = {way: [] for way in ways}

    def sender(way: str) -> Any:
        return lambda: replies[way].append(_sent(service, way, bodies, at_once=count))

    timed = until_told(
        {way: sender(way) for way in ways},
        warmup=0,
        rounds=rounds,
        precision=precision if len(ways) > 1 else None,
        limit_s=limit_s if len(ways) > 1 and precision is not None else None,
        progress=False,
    )
    spans = {way: [_span_ms(each) for each in replies[way]] for way in ways}
    name = "1 caller" if count == 1 else f"{count} callers"
    return Load(name, count, None, replies, spans, timed if len(ways) > 1 else None)


def _arriving(
    service: Served,
    ways: Sequence[str],
    asked: Sequence[Mapping[str, Any]],
    percent: float,
    per_second: float,
    requests: int,
    seed: int,
) -> Load:
    bodies, times = _bodies(service, asked, requests), arrivals(requests, per_second, seed)
    replies: dict[str, list[list[Reply]]] = {way: [] for way in ways}
    for order in (ways, ways[::-1]):
        for way in order:
            replies[way].append(_sent(service, way, bodies, sent_s=times))
    spans = {way: [_span_ms(each) for each in replies[way]] for way in ways}
    return Load(f"busy to {percent:g} %", None, per_second, replies, spans, None)


def _values(replies: Sequence[Reply], name: str) -> list[float]:
    return [value for reply in replies if (value := getattr(reply, name)) is not None]


def _median(replies: Sequence[Reply], name: str) -> float:
    values = _values(replies, name)
    return float(np.median(values)) if values else math.nan


def _mean(replies: Sequence[Reply], name: str) -> float:
    values = _values(replies, name)
    return float(np.mean(values)) if values else math.nan
