"""What techniques ask of a model that change the inside of Wan's denoisers."""

from __future__ import annotations

from collections.abc import Mapping

from wanlab.models.spec import EXPERTS, ModelSpec

DENOISER = "WanTransformer3DModel"


def only_wan(spec: ModelSpec) -> str:
    """What a model would have to be; empty if its denoisers are Wan's."""
    for name in (name for name in spec.components if name in EXPERTS):
        part = spec.part(spec.part_of(name))
        if part.class_name != DENOISER:
            return f"a {DENOISER}, whose blocks it knows; {spec.name} has {part.class_name}"
    return ""


def head_size(spec: ModelSpec) -> int | None:
    """Channels of a head of attention in the denoisers."""
    expert = next((name for name in spec.components if name in EXPERTS), None)
    return None if expert is None else spec.part(spec.part_of(expert)).config.get("attention_head_dim")


def in_graphs(reason: str) -> Mapping[str, str]:
    """`not_on` of engines that run an exported graph."""
    return {"onnxruntime": reason, "tensorrt": reason, "tvm": reason}
