"""What techniques of guidance have in common."""

from __future__ import annotations

from wanlab.models.families import family_of
from wanlab.models.families.base import SEQUENTIAL
from wanlab.models.spec import ModelSpec


def only_sequential(spec: ModelSpec) -> str:
    """Why the branches of guidance of a model cannot be told apart; empty if they can."""
    family = family_of(spec.pipeline_class)
    if family.guidance == SEQUENTIAL:
        return ""
    return f"a model whose branches of guidance are calls of their own; {spec.name} ({family}) computes them in one"
