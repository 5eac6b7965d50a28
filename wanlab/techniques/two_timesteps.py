"""Two timesteps: TI2V-5B's timestep per token is embedded once for the first latent frame and once for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.technique import Bound, NoSettings, Proof, Shares, Technique
from wanlab.techniques.wan import in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.techniques import timestep_rows
    from wanlab.techniques.place import Place
    from wanlab.techniques.timestep_rows import Rows
else:  # a configuration is read without them
    timestep_rows = LazyModule("wanlab.techniques.timestep_rows")


class TwoTimesteps(Technique[NoSettings]):
    """The picture's latent frame is free of noise and has timestep 0; all other tokens have the step's own. diffusers embeds
    a timestep for every token and gives each block a table of 6 modulations for every token, most of them the same."""

    name = "two_timesteps"
    does = "embeds the timestep of the first latent frame and that of all others once, not for every token"
    tier = "numeric"
    order = 5
    order_reason = "it changes how the blocks are modulated, not how they attend"
    not_on = in_graphs("its graph takes a timestep for every token")

    def __init__(self, settings: NoSettings | None = None) -> None:
        super().__init__(settings)
        self.rows: dict[str, Rows] = {}

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if spec.expand_timesteps:
            return only_wan(spec)
        return f"a model with a timestep for every token, such as Wan2.2-TI2V-5B; {spec.name} has one for all"

    def bound(self, shares: Shares) -> Bound:
        return Bound(
            shares.denoising * shares.timesteps,
            f"timesteps of tokens are {100 * shares.timesteps:.2g} % of a forward by {shares.source}, a byte of their table"
            " counted as the operations that an H200 does meanwhile",
        )

    def apply(self, place: Place) -> None:
        for component in (name for name in place.model.components if name in EXPERTS):
            self.rows[component] = timestep_rows.use_two_rows(place.network(component))
            place.denoising.at_begin.append(self.rows[component].forget)

    def proof(self, place: Place) -> Proof:
        ran, parts = place.calls[place.calls["ran"]].groupby("component").size(), []
        for component, rows in self.rows.items():
            title, forwards = component_title(component), int(ran.get(component, 0))
            if not forwards:
                continue
            if rows.asked == 0:
                return Proof(False, f"{self.name}: the {title} was given no timesteps of tokens.")
            if rows.others or rows.computed >= rows.asked:
                return Proof(
                    False,
                    f"{self.name} embedded {rows.computed:,} of {rows.asked:,} rows of the {title}: in {rows.others} of"
                    f" {forwards} forwards they were not those of the first frame and of the others.",
                )
            parts.append(f"{rows.computed:,} rows for {rows.asked:,} tokens of the {title}")
        if not parts:
            return Proof(False, f"{self.name} took part in nothing: no denoiser ran.")
        return Proof(True, f"{self.name} embedded {listed(parts)}.")
