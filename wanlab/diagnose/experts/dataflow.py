"""What flows through the switch of experts: the parts of a loaded model, and the tensors between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.measure.entry_points import entry_points, standing_in
from wanlab.models.schedule import fewest_steps, precompute_schedule

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.models.generate import Model
    from wanlab.models.schedule import ExpertSchedule


@dataclass(frozen=True, eq=False)
class DataFlow:
    """The parts of a loaded model and the tensors that go from one to the next.

    Attributes:
        nodes: node, kind ("input", "network", "decision", "scheduler", "output"), class_name, parameters, size_bytes, dtype,
            device (of the weights: empty for an engine, each half of a VAE has its own), steps (of an expert).
        edges: source, target, tensor, shape (e.g. "1x16x5x16x24"), dtype; as recorded in a generation.
        schedule: what decides.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    schedule: ExpertSchedule


def data_flow(model: Model, image: Any, prompt: str, **settings) -> DataFlow:
    """Record one generation, with the fewest steps that reach every expert, and see what goes in and out of each part.

    Args:
        image, prompt, settings: as `Model.generate` takes them; `steps` is that of the schedule which is shown. Without
            guidance unless `guidance_scale` is given.
    """
    import pandas as pd

    plan = precompute_schedule(model, settings.get("steps"))
    short = {"guidance_scale": 1.0} | settings | {"steps": fewest_steps(model, plan)}
    seen: dict[str, dict[str, tuple]] = {}

    def seeing(node: str) -> Callable:
        def wrap(call: Callable) -> Callable:
            def called(*args, **kwargs):
                result = call(*args, **kwargs)
                named = {str(i): value for i, value in enumerate(args)} | kwargs
                seen.setdefault(node, {key: _form(value) for key, value in (named | {"out": result}).items()})
                return result

            return called

        return wrap

    points = entry_points(model.pipeline) | {"scheduler": {"step": "scheduler"}}
    wrap = {part: {method: seeing(node) for method, node in calls.items()} for part, calls in points.items()}
    with standing_in(model.pipeline, wrap):
        model.generate(image, prompt, **short)
    experts = [entry.component for entry in plan.prefetch if entry.component in seen]
    router = "boundary" if plan.boundary_ratio is not None else experts[0]
    links = [
        ("prompt", "text_encoder", "tokens", "text_encoder", "0"),
        ("image", "vae_encoder", "frames", "vae_encoder", "0"),
        ("text_encoder", router, "text", experts[0], "encoder_hidden_states"),
        ("vae_encoder", router, "condition", "vae_encoder", "out"),
        ("noise", router, "latents", "scheduler", "2"),
        *((router, name, "latents, condition", name, "hidden_states") for name in experts if router != name),
        *((name, "scheduler", "prediction", name, "out") for name in experts),
        ("scheduler", router, "next latents", "scheduler", "out"),
        ("scheduler", "vae_decoder", "latents", "vae_decoder", "0"),
        ("vae_decoder", "video", "frames", "vae_decoder", "out"),
    ]
    edges = [(*ends, *form) for *ends, of, key in links if (form := seen.get(of, {}).get(key))]
    ends = {name for edge in edges for name in edge[:2]}
    kinds = {"boundary": "decision", "scheduler": "scheduler", "video": "output"}
    nodes = [{"node": name, "kind": kinds.get(name, "input")} for name in ("prompt", "image", "noise")]
    for name in (*seen, "boundary", "video"):
        network = model.components.get(name, getattr(model.pipeline, name, None))
        nodes.append({"node": name, "kind": kinds.get(name, "network")} | _facts(name, network))
        nodes[-1]["steps"] = plan.steps_of(name) if name in experts else None
    frame = pd.DataFrame([node for node in nodes if node["node"] in ends])
    frame = frame.astype({"parameters": "Int64", "size_bytes": "Int64", "steps": "Int64"})
    columns = ["source", "target", "tensor", "shape", "dtype"]
    return DataFlow(frame, pd.DataFrame(edges, columns=columns), plan)


def _form(value: Any) -> tuple[str, str] | None:
    """Shape and dtype of a tensor, or of the first in what a component gives back."""
    if hasattr(value, "latent_dist"):
        value = value.latent_dist.mode()
    for name in ("last_hidden_state", "sample", "prev_sample"):
        value = getattr(value, name, value)
    value = value[0] if isinstance(value, tuple) else value
    if not hasattr(value, "shape"):
        return None
    return "x".join(map(str, value.shape)), str(value.dtype).removeprefix("torch.")


def _facts(node: str, part: Any) -> dict[str, Any]:
    """Class, size and place of a part; the weights of a VAE's half are those that it alone uses."""
    if part is None:
        return {}
    weights = dict(part.named_parameters()) if hasattr(part, "named_parameters") else {}
    decoding = ("decoder.", "post_quant_conv.")
    if node.startswith("vae"):
        weights = {k: p for k, p in weights.items() if k.startswith(decoding) == (node == "vae_decoder")}
    facts: dict[str, Any] = {"class_name": type(part).__name__}
    if weights:
        facts["parameters"] = sum(p.numel() for p in weights.values())
        facts["size_bytes"] = sum(p.nbytes for p in weights.values())
        facts["dtype"] = str(max(weights.values(), key=lambda p: p.nbytes).dtype).removeprefix("torch.")
        facts["device"] = str(next(iter(weights.values())).device)
    return facts
