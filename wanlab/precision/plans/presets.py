"""Plans that need no measurement: uniform formats, and the lists of layers that others keep by hand.

The hand-picked lists are common practice in published quantised video transformers: embedders, output projection and
modulation stay as they are, and the first and last blocks with them.
"""

from __future__ import annotations

from wanlab.precision.plans.plan import FLOATS, KEEP, Plan, make_plan

LINEAR = ("blocks.*", "condition_embedder.*", "proj_out")
"""Every linear layer of a Wan expert; its patch embedding is a convolution."""


def _uniform(format: str) -> Plan:
    rules = [{"format": format, "layers": LINEAR}]
    return make_plan(f"uniform-{format}", rules=rules, note="every linear layer of every expert")


def _blocks(format: str) -> Plan:
    rules = [{"format": format, "layers": ("blocks.*",), "note": "embedders and proj_out are kept"}]
    return make_plan(f"blocks-{format}", rules=rules, note="hand-picked: every block, nothing else")


def inner_blocks(format: str, ends: int = 3) -> Plan:
    """All linear layers of the blocks but the first and last few, which published lists keep as they are.

    Args:
        ends: blocks kept at each end; three of a network of thirty or forty is the common choice.
    """
    rules = [
        {"format": format, "layers": ("blocks.*",), "note": "embedders and proj_out are kept"},
        {"format": KEEP, "blocks": f"first {ends}, last {ends}", "note": "first and last blocks are kept"},
    ]
    name = f"inner-{format}" if ends == 3 else f"inner-{ends}-{format}"
    return make_plan(name, rules=rules, note=f"hand-picked: all but the first and last {ends} blocks")


def _ffn(format: str) -> Plan:
    rules = [{"format": format, "layers": ("ffn.*",)}]
    return make_plan(f"ffn-{format}", rules=rules, note="hand-picked: feed-forward layers alone")


PRESETS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        *(make_plan(f"all-{name}", name, note=f"everything in {name}") for name in FLOATS),
        *(_uniform(name) for name in ("int8", "fp8", "fp8-channel", "int8-weight")),
        _blocks("int4-weight"),
        *(make(name) for make in (_blocks, inner_blocks, _ffn) for name in ("int8", "fp8")),
    )
}
"""Plans by name, as baselines for those that are chosen by measurement."""
