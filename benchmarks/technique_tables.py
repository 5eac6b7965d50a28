"""The table of techniques in the docs, from the registry."""

from __future__ import annotations

from table_text import markdown

from wanlab.techniques import TECHNIQUES
from wanlab.techniques.technique import setting_text


def techniques() -> str:
    rows = []
    for kind in sorted(TECHNIQUES.values(), key=lambda each: each.order):
        settings = kind().settings
        shown = [f"`{name}` {setting_text(getattr(settings, name))}" for name in settings.__struct_fields__]
        rows.append(
            [
                f"`{kind.name}`",
                kind.does,
                kind.tier,
                ", ".join(shown) or "none",
                ", ".join(f"`{name}`" for name in sorted({*kind.not_with, *kind.not_on})) or "-",
            ]
        )
    return markdown(["technique", "what it does", "tier", "settings, with their defaults", "not with"], rows)
