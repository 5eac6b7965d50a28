"""How far the two experts' predictions lie apart on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.entry_points import standing_in
from wanlab.models.schedule import precompute_schedule

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from wanlab.models.generate import Model


@dataclass(frozen=True, eq=False)
class Disagreement:
    """How far the two experts' predictions lie apart on the same inputs.

    Attributes:
        steps: per asked step: step, timestep, sigma, snr, component (the expert that ran it), other, relative_l2
            (norm of the difference over the norm of what ran), cosine, and the same relative_l2 for what is no
            difference at all: again_l2 (the same expert called twice), kernel_l2 (with another exact attention kernel).
        boundary_timestep: where the experts change over.
        kernel: name of the other attention kernel.
    """

    steps: pd.DataFrame
    boundary_timestep: float
    kernel: str

    def at_boundary(self) -> dict[str, Any]:
        """The asked step whose timestep is nearest to the boundary, as a record with floor_l2, the larger floor."""
        nearest = (self.steps["timestep"] - self.boundary_timestep).abs().idxmin()
        row = self.steps.loc[nearest].to_dict()
        return row | {"floor_l2": max(row["again_l2"], row["kernel_l2"])}

    def row(self) -> dict[str, float]:
        """Flat record: disagreement and disagreement_floor (relative L2) at disagreement_timestep, nearest the boundary."""
        near = self.at_boundary()
        named = {"": "relative_l2", "_floor": "floor_l2", "_timestep": "timestep", "_cosine": "cosine"}
        return {f"disagreement{key}": float(near[column]) for key, column in named.items()}

    def __str__(self) -> str:
        near = self.at_boundary()
        percent, floor = (100 * near[key] for key in ("relative_l2", "floor_l2"))
        return f"at timestep {near['timestep']:g} the experts differ by {percent:.1f} % (floor {floor:.2g} %)"


def disagreement(
    model: Model, image: Any, prompt: str, *, at_steps: Sequence[int] | None = None, **settings
) -> Disagreement:
    """Ask both experts at the steps of one real generation, which goes on with the answer of the one whose turn it is.

    Teacher-forced: latents, timestep and text are those of the generation at that step. Only the branch with the prompt
    is asked. Each asked step costs three forwards more, one of them with an attention kernel that may be slow.

    Args:
        image, prompt, settings: as `Model.generate` takes them.
        at_steps: steps to ask at; all if None.

    Raises:
        WanlabError: a model with one expert, a step that the run does not have, or what `Model.generate` refuses.
    """
    import pandas as pd

    from wanlab.models.attention import other_attention

    if "expert_low" not in model.spec.components:
        raise WanlabError(f"{model.spec.name} has one expert; two are needed to disagree")
    table = precompute_schedule(model, settings.get("steps"))
    known = table.table.set_index("step")
    wanted = set(known.index if at_steps is None else at_steps)
    if not wanted or wanted - set(known.index):
        raise WanlabError(
            f"at_steps is {list(at_steps)}; choose from steps 0 to {len(known) - 1}, at least one"
        )
    networks = {name: model.component(name) for name in ("expert_high", "expert_low")}
    rows: list[dict] = []
    at = {"step": 0, "kernel": ""}

    def asking(name: str) -> Callable:
        other = next(key for key in networks if key != name)

        def wrap(call: Callable) -> Callable:
            def asked(*args, **kwargs):
                ran = call(*args, **kwargs)
                step = at["step"]
                if step in wanted and not any(row["step"] == step for row in rows):
                    theirs, again = networks[other](*args, **kwargs)[0], call(*args, **kwargs)[0]
                    with other_attention(model.device) as at["kernel"]:
                        kernel = call(*args, **kwargs)[0]
                    mine = ran[0]
                    apart, cosine = _apart(mine, theirs)
                    rows.append(
                        {"step": step, **known.loc[step].to_dict(), "component": name, "other": other}
                        | {"relative_l2": apart, "cosine": cosine}
                        | {"again_l2": _apart(mine, again)[0], "kernel_l2": _apart(mine, kernel)[0]}
                    )
                return ran

            return asked

        return wrap

    def counted(call: Callable) -> Callable:
        def step(*args, **kwargs):
            at["step"] += 1
            return call(*args, **kwargs)

        return step

    wrappers = {model.spec.part_of(name): {"__call__": asking(name)} for name in networks}
    with standing_in(model.pipeline, wrappers | {"scheduler": {"step": counted}}):
        model.generate(image, prompt, **{"output": "latent"} | settings)
    return Disagreement(pd.DataFrame(rows), table.boundary_timestep, at["kernel"])


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Relative L2 distance and cosine, in double precision: nearly equal predictions differ in late digits."""
    import torch

    a, b = ours.double().flatten(), theirs.double().flatten()
    length = torch.linalg.vector_norm(a)
    if not length:
        return float("nan"), float("nan")
    distance = torch.linalg.vector_norm(a - b) / length
    return float(distance), float(torch.nn.functional.cosine_similarity(a, b, dim=0))
