"""The table of techniques in the docs, from the registry."""

from __future__ import annotations

from table_text import markdown

from wanlab.techniques import TECHNIQUES, conflicts
from wanlab.techniques.attention.kernels import KERNELS
from wanlab.techniques.technique import setting_text


def attention_kernels() -> str:
    rows = []
    for kernel in KERNELS.values():
        (low, high), (least, most, step) = kernel.capability, kernel.head_sizes
        ends = [".".join(map(str, end)) for end in (low, high)]
        gpus = ends[0] if low == high else f"{ends[0]} or later" if high[0] == 99 else " to ".join(ends)
        sizes = "any" if step == 1 else f"{least} to {most}, by {step}" if most < 1 << 16 else f"by {step}"
        rows.append(
            [
                f"`{kernel.name}`",
                "any" if low == (0, 0) else gpus,
                ", ".join(kernel.dtypes),
                sizes,
                "yes" if kernel.cpu else "no",
                f"`{kernel.install}`" if kernel.install else "comes with PyTorch",
                kernel.rounds or "nothing",
            ]
        )
    head = [
        "kernel",
        "compute capability",
        "dtypes on a GPU",
        "channels of a head",
        "on a CPU",
        "package",
        "rounds",
    ]
    return markdown(head, rows)


def techniques() -> str:
    rows = []
    for kind in sorted(TECHNIQUES.values(), key=lambda each: each.order):
        settings = kind().settings
        shown = [f"`{name}` {setting_text(getattr(settings, name))}" for name in settings.__struct_fields__]
        others = {name for name in TECHNIQUES if conflicts((kind.name, name))}
        rows.append(
            [
                f"`{kind.name}`",
                kind.does,
                kind.tier,
                ", ".join(shown) or "none",
                ", ".join(f"`{name}`" for name in sorted({*others, *kind.not_on})) or "-",
            ]
        )
    return markdown(["technique", "what it does", "tier", "settings, with their defaults", "not with"], rows)
