"""Report of an engine from its files: time and bytes of its layers by role, by operator and by number format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wanlab.core.answer import Answer, Tile, answer, step
from wanlab.core.errors import WanlabError
from wanlab.core.words import capital, counted, shown
from wanlab.core.yaml_lines import load_yaml
from wanlab.engine_report.from_onnx import read_onnx
from wanlab.engine_report.from_onnxruntime import read_ort_profile
from wanlab.engine_report.from_tensorrt import latency_of, read_inspector, with_times
from wanlab.engine_report.layers import CONVERSIONS, EngineLayers, Layer, Tensor, described
from wanlab.engine_report.rules import Finding, lint
from wanlab.engine_report.schema import PlannedLayer, read_json, typed

ATTENTION = ("attn1", "attn2")
APART_PERCENT = 10.0
"""A larger difference between the sum of the layers and the whole engine stands below the headline."""


@dataclass(frozen=True, eq=False)
class EngineReport:
    """Summary of one engine.

    Attributes:
        layers: layers of the engine.
        findings: findings of `lint`, longest first.
        by_role, by_kind, by_type, by_precision, by_site: tables of layers, time_ms, share_percent, weight_bytes,
            activation_bytes; each adds up to the whole. A site is a module without the number of its block.
    """

    layers: EngineLayers
    findings: tuple[Finding, ...]
    by_role: pd.DataFrame
    by_kind: pd.DataFrame
    by_type: pd.DataFrame
    by_precision: pd.DataFrame
    by_site: pd.DataFrame

    def top(self, rows: int = 10) -> pd.DataFrame:
        """The layers with the most time; without times those with the most bytes of outputs or, if unknown, of weights."""
        known = "activation_bytes" if self.totals["activations_written_bytes"] else "weight_bytes"
        by = "time_ms" if self.layers.timed else known
        frame = self.layers.frame.sort_values(by, ascending=False, kind="stable", na_position="last").head(
            rows
        )
        columns = ["modules", "type", "precision", "time_ms", "share_percent", "activation_bytes"]
        outputs = [_shown(self.layers.layers[i].outputs) for i in frame.index]
        return frame[columns].assign(outputs=outputs, name=frame["name"]).reset_index(drop=True)

    def share_percent(self, roles: Iterable[str]) -> float:
        """Time of the layers of these roles in percent of the time of all layers; NaN without times."""
        return _share(self.layers.layers, lambda layer: layer.role in roles, self.layers.total_ms)

    @property
    def totals(self) -> dict[str, float]:
        """Number and total time of the layers, latency of the engine and the difference, weights, conversions.

        `beyond_layers_ms` is the latency minus the sum of the layers. It is negative if the measurement of each layer adds
        time, as with TensorRT.
        """
        layers = self.layers.layers
        conversions = [layer for layer in layers if layer.kind in CONVERSIONS]
        sizes = [layer.activation_bytes for layer in layers]
        return {
            "layers": len(layers),
            "layers_ms": self.layers.total_ms,
            "latency_ms": self.layers.latency_ms,
            "beyond_layers_ms": self.layers.latency_ms - self.layers.total_ms,
            "attention_percent": self.share_percent(ATTENTION),
            "conversions": len(conversions),
            "conversions_percent": _share(
                layers, lambda layer: layer.kind in CONVERSIONS, self.layers.total_ms
            ),
            "joined_percent": 100 * sum(bool(layer.modules) for layer in layers) / len(layers)
            if layers
            else math.nan,
            "weight_bytes": sum(layer.weight_bytes for layer in layers),
            # 0 if no size is known, as with free axes.
            "largest_activation_bytes": max(sizes, default=0),
            "activations_written_bytes": sum(sizes),
            **self.layers.facts,
        }

    def lint_frame(self) -> pd.DataFrame:
        """A row per finding: hazard, mitigation, help, layers, time_ms, share_percent, size_bytes, example."""
        columns = [
            "hazard",
            "mitigation",
            "help",
            "layers",
            "time_ms",
            "share_percent",
            "size_bytes",
            "example",
        ]
        total = self.layers.total_ms
        rows = [finding.row() | {"share_percent": 100 * finding.time_ms / total} for finding in self.findings]
        return pd.DataFrame(rows, columns=columns)

    @property
    def caveat(self) -> str:
        """A sentence about the difference between the layers' sum and the latency; empty without a latency."""
        sum_ms, latency_ms = self.layers.total_ms, self.layers.latency_ms
        if math.isnan(latency_ms) or math.isnan(sum_ms):
            return ""
        direction = "more" if sum_ms > latency_ms else "less"
        return (
            f"the layers add up to {sum_ms:,.2f} ms, {abs(sum_ms / latency_ms - 1) * 100:.0f} % {direction} than the"
            f" {latency_ms:,.2f} ms of the whole engine measured separately: measuring each layer adds time, and work"
            " between layers belongs to none; read shares, not sums"
        )

    def answer(self, other: EngineLayers | None = None, roles: pd.DataFrame | None = None) -> Answer:
        """The report for the top of a page: what takes the time, what is wrong, and what another engine does better.

        Args:
            other: a second engine. roles: from `difference_by(match_layers(self.layers, other), "role")`.
        """
        totals, layers = self.totals, self.layers
        fused = [finding for finding in self.findings if finding.rule == "attention not fused"]
        unfused = sum(len(finding.layers) for finding in fused)
        scores = max((finding.size_bytes for finding in fused), default=0)
        longest = self.by_role.iloc[0]
        role = ROLE_TEXTS.get(longest["role"], str(longest["role"]).replace("_", " "))
        time = "launch time on the host" if layers.times_of == "launches" else "time"
        share = self.by_role["share_percent"].iloc[0]
        head = f"{capital(role)} take most of the {time}, {share:.0f} %" if layers.timed else ""
        head = head or f"{totals['layers']} layers, none of them timed"
        wrong = f"{counted(unfused, 'layer')} of attention {'is' if unfused == 1 else 'are'} not fused"
        headline = f"{head}; {wrong if unfused else 'no attention is left unfused'}."
        apart = abs(totals["beyond_layers_ms"]) > APART_PERCENT / 100 * totals["latency_ms"]
        sums = f"The layers add up to {shown(layers.total_ms, 'ms')}, the whole engine took"
        sums += f" {shown(totals['latency_ms'], 'ms')} by itself: read shares, not sums."
        details = [sums if apart else ""]
        tiles = [
            Tile("time of the layers", shown(layers.total_ms, "ms"), _beside_latency(totals["latency_ms"]))
        ]
        if layers.timed:
            tiles.append(Tile("attention", shown(totals["attention_percent"], "%"), f"of the {time}"))
        written = f"write {shown(scores, 'bytes')} of scores" if scores else "" if unfused else "none is left"
        tiles.append(Tile("attention not fused", counted(unfused, "layer"), written))
        share = (
            f"{totals['conversions_percent']:.1f} % of the time" if layers.timed else "dtype or layout only"
        )
        tiles.append(Tile("conversions", f"{totals['conversions']}", share))
        if other is not None and roles is not None:
            details.insert(0, compared(layers, other, roles))
            tiles[-1] = _beside(layers, other, roles)
        following = step(
            self.findings[0].mitigation
            if self.findings
            else "Nothing is wrong in it: look at the longest layers below"
        )
        return answer(headline, *details, tiles=tiles, next=following)


ROLE_TEXTS = {
    "attn1": "self-attention layers",
    "attn2": "cross-attention layers",
    "ffn": "feed-forward layers",
    "norm": "norms and modulation",
    "embeddings": "embeddings and output",
    "convolution": "convolutions",
    "reformat_cast": "conversions",
    "other": "other layers",
    "several": "layers of several parts",
}
"""Role of a layer -> its layers in a sentence."""


def _beside_latency(latency_ms: float) -> str:
    return "" if math.isnan(latency_ms) else f"whole engine {shown(latency_ms, 'ms')}, measured apart"


def _beside(a: EngineLayers, b: EngineLayers, roles: pd.DataFrame) -> Tile:
    """A second engine beside the first, in time where both were timed."""
    if not (a.timed and b.timed):
        return Tile("layers of the other engine", f"{len(b.layers)}", f"{len(a.layers)} here")
    other, first = shown(b.total_ms, "ms"), shown(a.total_ms, "ms")
    if not (roles["outside_noise"] != "no").any():
        return Tile("the other engine's layers", other, f"{first} in the first: no more than noise")
    change = 100 * (b.total_ms / a.total_ms - 1)
    return Tile("the other engine's layers", f"{change:+.0f} %", f"{other}, {first} in the first")


def compared(a: EngineLayers, b: EngineLayers, roles: pd.DataFrame) -> str:
    """A sentence about two engines, from `difference_by(match_layers(a, b), "role")`."""
    sentence = f"{b.name} has {len(b.layers)} layers"
    if not (a.timed and b.timed):
        return f"{sentence}, {a.name} {len(a.layers)}."
    change = 100 * (b.total_ms / a.total_ms - 1)
    sentence += f" and takes {abs(change):.0f} % {'more' if change > 0 else 'less'} time in them"
    distinct = roles[roles["outside_noise"] != "no"]
    if not len(distinct):
        return f"{sentence}; no part of it is outside the noise."
    most = distinct.iloc[0]
    return f"{sentence}; most of it in {most['role']} ({most['difference_ms']:+,.2f} ms, noise {most['noise_ms']:,.2f})."


def summarize(
    layers: EngineLayers, *, planned: Mapping[str, str] | None = None, minimum_percent: float = 1.0
) -> EngineReport:
    """The report of an engine, or of a graph without times.

    Args:
        layers: layers of the engine.
        planned: pattern of module names (`"blocks.*.attn1.to_q"`) -> planned number format (`"fp16"`, `"int8"`, `"fp8"`,
            `"int8-weight"`); later patterns have priority.
        minimum_percent: share of the time, in percent, from which conversions are a finding.
    """
    return EngineReport(
        layers,
        lint(layers, planned=planned, minimum_percent=minimum_percent),
        **{f"by_{name}": grouped(layers, name) for name in ("role", "kind", "type", "precision", "site")},
    )


def grouped(layers: EngineLayers, by: str | list[str]) -> pd.DataFrame:
    """Layers, time_ms, share_percent, weight_bytes and activation_bytes by columns of `EngineLayers.frame`."""
    frame = layers.frame
    keys = [by] if isinstance(by, str) else by
    groups = frame.groupby(keys, sort=False, dropna=False)
    table = groups.agg(
        layers=("index", "size"),
        weight_bytes=("weight_bytes", "sum"),
        activation_bytes=("activation_bytes", "sum"),
    )
    table["time_ms"] = groups["time_ms"].sum(min_count=1)
    table["share_percent"] = 100 * table["time_ms"] / layers.total_ms
    table = table.reset_index()[
        [*keys, "layers", "time_ms", "share_percent", "weight_bytes", "activation_bytes"]
    ]
    table = table.sort_values("time_ms" if layers.timed else "layers", ascending=False, kind="stable")
    return pd.DataFrame(table).reset_index(drop=True)


def _shown(tensors: tuple[Tensor, ...], most: int = 2) -> str:
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return ", ".join(described(tensor) for tensor in tensors[:most]) + more


def _share(layers: tuple[Layer, ...], chosen: Callable[[Layer], bool], total_ms: float) -> float:
    if not total_ms or math.isnan(total_ms):
        return math.nan
    return 100 * math.fsum(x.time_ms for x in layers if chosen(x) and not math.isnan(x.time_ms)) / total_ms


def read_planned(path: str | os.PathLike | None) -> dict[str, str]:
    """Pattern of module names -> planned number format, from a file; empty for None.

    Args:
        path: YAML or JSON of a flat mapping, or the report beside a graph that wanlab quantised (`<graph>.json`).

    Raises:
        WanlabError: no such file, or other content.
    """
    if path is None:
        return {}
    path = Path(path)
    data = load_yaml(path, "the plan").data if path.suffix.lower() in (".yaml", ".yml") else read_json(path)
    if isinstance(data, Mapping) and isinstance(data.get("layers"), list):
        data = {row.layer: row.format for row in typed(data["layers"], list[PlannedLayer], str(path))}
    if not isinstance(data, Mapping) or not all(isinstance(value, str) for value in data.values()):
        shown = json.dumps({"blocks.*.attn1.to_q": "int8"})
        raise WanlabError(f"{path} is no mapping of module patterns to formats; write {shown}")
    return {str(pattern): value for pattern, value in data.items()}


def read_layers(
    path: str | os.PathLike, beside: Sequence[str | os.PathLike] | None = None, *, blocking: bool = False
) -> EngineLayers:
    """The layers of an engine from saved files; the kind of each file is recognised by its content.

    Args:
        path: inspector JSON of TensorRT, profile of ONNX Runtime (both plain or `.gz`), or an ONNX graph.
        beside: additional files: the ONNX graph of a profile; layer times of `trtexec --exportProfile`; times of whole
            runs of `trtexec --exportTimes` or `wanlab bench`.
        blocking: whether the profile of ONNX Runtime was taken with `CUDA_LAUNCH_BLOCKING=1`.

    Raises:
        WanlabError: another kind of file, or one that does not belong to `path`.
    """
    path, extra = Path(path), [Path(file) for file in beside or ()]
    graphs = [file for file in extra if file.suffix.lower() == ".onnx"]
    if path.suffix.lower() == ".onnx":
        layers = read_onnx(path)
    else:
        data = read_json(path)
        if isinstance(data, Mapping):
            layers = read_inspector(data, name=path.name)
        elif isinstance(data, list) and any(isinstance(event, Mapping) and "cat" in event for event in data):
            graph = graphs[0] if graphs else None
            layers = read_ort_profile(data, graph, name=path.name, blocking=blocking)
        else:
            raise WanlabError(
                f"{path} is neither inspector JSON of TensorRT nor a profile of ONNX Runtime; times of trtexec go beside"
                " the inspector JSON of their engine"
            )
    if graphs and layers.source != "onnxruntime":
        raise WanlabError(f"{graphs[0]} does not go with {path}: a graph goes with a profile of ONNX Runtime")
    for file in extra:
        if file in graphs:
            continue
        data = read_json(file)
        if isinstance(data, list) and any(isinstance(row, Mapping) and "timeMs" in row for row in data):
            if layers.source != "tensorrt":
                raise WanlabError(f"{file} does not go with {path}: times of layers go with inspector JSON")
            layers = with_times(layers, data)
        else:
            layers = layers.with_latency(latency_of(data, str(file)))
    return layers
