"""What is wrong with an engine, found in its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from wanlab.convert.card import rules_precision, rules_structure
from wanlab.convert.card.findings import Finding
from wanlab.convert.card.layers import EngineLayers


def lint(
    layers: EngineLayers, *, planned: Mapping[str, str] | None = None, minimum_percent: float = 1.0
) -> tuple[Finding, ...]:
    """Findings by time, then by bytes, then by how many layers they concern.

    Of a graph that no engine has seen, only what no engine is sure to mend is said.

    Args:
        planned: pattern of module names -> number format; see `card`.
        minimum_percent: share of the time from which conversions and moves are a finding.

    Raises:
        WanlabError: a planned format that does not exist.
    """
    found = [
        *rules_structure.unfused_attention(layers),
        *rules_structure.norm_chains(layers),
        *rules_structure.weight_transposes(layers),
        *rules_structure.bad_operators(layers),
        *rules_structure.off_device(layers),
        *rules_precision.not_as_planned(layers, planned or {}),
        *rules_precision.between_quantised(layers),
        *rules_precision.left_quantisers(layers),
        *rules_precision.islands(layers),
        *rules_precision.conversions(layers, minimum_percent),
        *rules_structure.moved(layers, minimum_percent),
    ]

    def weight(finding: Finding) -> tuple[float, int, int]:
        time_ms = finding.time_ms
        return 0.0 if math.isnan(time_ms) else time_ms, finding.size_bytes, len(finding.layers)

    return tuple(sorted(found, key=weight, reverse=True))
