"""Whether a plan had the effect it names: read from weights, operators and kernels, not from what was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.applied.apply import Applied, experts_of
from wanlab.precision.applied.layers import AS_LOADED, asked
from wanlab.precision.effects.faults import Fault, raise_first, raise_weights
from wanlab.precision.effects.held import Held, read_held
from wanlab.precision.plans.assignment import Assignment
from wanlab.precision.plans.plan import FLOATS

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from wanlab.models import Model
    from wanlab.precision.effects.operators import Product


@dataclass(frozen=True, eq=False)
class Effect:
    """What was found of a plan.

    Attributes:
        verdict: one sentence.
        frame: one row per component and format: component, format (`"as-loaded"` where the plan changes nothing),
            layers_asked, layers_found, weight_before_bytes, weight_bytes, held (dtypes of the weights in memory), products
            (operators with the dtypes of their operands; of a graph its nodes), kernels (on a GPU, most time first).
        layers: one row per layer and format: component, layer, format, held, weight_before_bytes, weight_bytes, product.
        kernels: of one forward: component, operator, kernel, calls, share_percent; empty without a profile.
    """

    verdict: str
    frame: pd.DataFrame
    layers: pd.DataFrame
    kernels: pd.DataFrame

    def __str__(self) -> str:
        return self.verdict


def effect_check(original: Model | None, applied: Applied, *, profile: bool | None = None) -> Effect:
    """Prove that a plan did what it says, or fail.

    Every layer's tensors are read: dtypes, bytes, and whether its codes are those of the original's weight by the
    definition of the format. Then every expert computes one small forward (of every range of steps) in which the operands
    of each layer's product are looked at, with compiled parts running eagerly; on a GPU it is also profiled.

    Args:
        original: the model before the plan; None, or the same model after `in_place=True`, where it is gone: then weights
            are not compared with it.
        applied: from `apply_plan`.
        profile: name the kernels too; None does on a GPU.

    Raises:
        WanlabError: a plan that changed nothing; an expert that was left out; a layer that is not in the network; weights
            or products in float32 where the plan says otherwise; weights that were dequantised once at load; a quantiser
            that rounded nothing; a layer in another format than asked.
    """
    import pandas as pd

    assignment, model = applied.assignment, applied.model
    name = assignment.plan.name
    networks = {component: model.component(component) for component in assignment.components}
    before = _originals(original, applied)
    faults: list[Fault] = []
    rows: list[dict[str, Any]] = []
    kernels = []
    for component, network in networks.items():
        wanted = asked(assignment, component)
        modules = dict(network.named_modules())
        missing = [layer for layer in dict.fromkeys(wanted["layer"]) if layer not in modules]
        if missing:
            raise WanlabError(
                f"plan {name}: {component} has no layer {missing[0]!r}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: the name matches none of its layers; assign"
                " the plan to this model"
            )
        held = _weights(component, network, modules, wanted, assignment, before.get(component))
        faults += [Fault(component, one.layer, one.fault, one.said) for one in held.values() if one.fault]
        rows += [_row(component, one, applied) for one in held.values()]
    raise_weights(assignment, rows, faults)

    for component in networks:
        products, found, table = _products(applied, component, profile)
        faults += found
        for row in rows:
            if row["component"] == component:
                row["product"] = ", ".join(
                    dict.fromkeys(map(str, products.get((row["layer"], row["format"]), ())))
                )
        kernels.append(table.assign(component=component))
    raise_first(name, faults)
    layers = pd.DataFrame(rows)
    named = pd.concat(kernels, ignore_index=True)[
        ["component", "operator", "kernel", "calls", "share_percent"]
    ]
    frame = summary(layers, named)
    return Effect(_verdict(name, frame, applied.kernels), frame, layers, named)


def summary(layers: pd.DataFrame, kernels: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of layers by component and format; see `Effect.frame`."""
    import pandas as pd

    def joined(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    rows = []
    for (component, format), group in layers.groupby(["component", "format"], sort=False):
        operators = {said.split()[0] for value in group["product"] for said in value.split(", ") if said}
        names = ()
        if kernels is not None and len(kernels):
            mine = (kernels["component"] == component) & kernels["operator"].isin(operators)
            names = kernels.loc[mine, "kernel"]
        rows.append(
            {
                "component": component,
                "format": format,
                "layers_asked": group["layer"].nunique(),
                "layers_found": group.loc[group["found"], "layer"].nunique(),
                "weight_before_bytes": group["weight_before_bytes"].sum(min_count=1),
                "weight_bytes": int(group["weight_bytes"].sum()),
                "held": joined(group["held"]),
                "products": joined(part for value in group["product"] for part in value.split(", ")),
                "kernels": joined(names),
            }
        )
    return pd.DataFrame(rows).astype({"weight_before_bytes": "Int64"})


def _originals(original: Model | None, applied: Applied) -> dict[str, torch.nn.Module]:
    """The networks before the plan, where there are any."""
    if original is None or applied.in_place:
        return {}
    found = experts_of(original)
    return {name: found[name] for name in applied.assignment.components}


def _weights(
    component: str, network, modules: dict, wanted, assignment: Assignment, before
) -> dict[tuple[str, str], Held]:
    """Every layer in every format it is asked in, as it is held."""
    import torch

    from wanlab.models.networks import stored_dtype

    default = getattr(torch, FLOATS[assignment.default])
    made = {}
    for row in wanted.itertuples():
        module = _variant(modules[row.layer], row.wanted)
        kind = stored_dtype(network, f"{row.layer}.weight", default)
        original = None if before is None else before.get_submodule(row.layer).weight
        key = (row.layer, row.wanted)
        if key in made:
            continue
        if module is None:
            said = f"has no variant in {row.wanted} for steps {row.first_step} to {row.last_step}"
            made[key] = Held(row.layer, row.wanted, "", None, 0, "unquantised", said)
        else:
            made[key] = read_held(module, row.layer, row.wanted, kind, original)
    return made


def _variant(module, wanted: str):
    """What computes a layer in a format: one of several where the format changes with the step."""
    from wanlab.precision.applied.steps import SteppedLayer

    if not isinstance(module, SteppedLayer):
        return module
    return module.variants[wanted] if wanted in module.variants else None  # noqa: SIM401  torch 2.11 has no get


def _row(component: str, one: Held, applied: Applied) -> dict[str, Any]:
    before = one.weight_before_bytes
    if before is None:  # the original is gone; its size was noted when it was replaced
        noted = applied.frame[
            (applied.frame["component"] == component) & (applied.frame["layer"] == one.layer)
        ]
        before = int(noted["weight_before_bytes"].iloc[0])
    return {
        "component": component,
        "layer": one.layer,
        "format": one.wanted,
        "held": one.dtype,
        "weight_before_bytes": before,
        "weight_bytes": one.weight_bytes,
        "found": not one.fault,
        "product": "",
    }


def _products(applied: Applied, component: str, profile: bool | None):
    """Products of every layer and format in a small forward, what is wrong with them, and the kernels."""
    import pandas as pd

    from wanlab.precision.effects.operators import kernels, product_fault, small_forward, watch

    model, assignment = applied.model, applied.assignment
    call = small_forward(model, component)
    on_gpu = model.device.type == "cuda"
    named = dict(model.component(component).named_modules())
    wanted = asked(assignment, component)
    seen: dict[tuple[str, str], list[Product]] = {}
    faults: list[Fault] = []
    table = pd.DataFrame(columns=["operator", "kernel", "calls", "share_percent"])
    meant = applied.frame[applied.frame["component"] == component]
    for first, _ in assignment.bands(component):
        with applied.at(first or 0):
            rows = wanted if first is None else wanted[at_step(wanted, first)]
            formats = dict(zip(rows["layer"], rows["wanted"], strict=True))
            modules = {layer: _variant(named[layer], format) for layer, format in formats.items()}
            kinds = meant if first is None else meant[at_step(meant, first)]
            ways = dict(zip(kinds["layer"], kinds["kernel"], strict=True))
            for layer, products in watch(call, modules).items():
                format = formats[layer]
                if said := product_fault(modules[layer], format, ways[layer], products):
                    faults.append(Fault(component, layer, *said))
                seen.setdefault((layer, format), []).extend(products)
            if profile or (profile is None and on_gpu):
                table = pd.concat([table, kernels(call, model.device)], ignore_index=True)
    return seen, faults, table


def at_step(rows: pd.DataFrame, step: int) -> pd.Series:
    """Which rows hold at a step."""
    return rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))


def _verdict(name: str, frame: pd.DataFrame, kernels: str) -> str:
    changed = frame[frame["format"] != AS_LOADED]
    parts = [
        f"{row.layers_found} of {row.layers_asked} layers of {row.component} in {row.format}"
        for row in changed.itertuples()
    ]
    before, after = frame["weight_before_bytes"].sum(), frame["weight_bytes"].sum()
    size = f"; {after / 2**20:,.1f} MiB of weights" + (f" instead of {before / 2**20:,.1f}" if before else "")
    return f"Plan {name} took effect: {'; '.join(parts) or 'everything cast'}{size}; {kernels}."
