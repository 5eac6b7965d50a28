"""A plan resolved to one format per layer of a model."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from wanlab import models
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.formats import ELEMENT_TYPES
from wanlab.models.blocks import blocks_of, linears, numbered_path, split_path
from wanlab.models.families import family_of_network
from wanlab.models.networks import skeleton, stored_dtype
from wanlab.models.spec import EXPERTS, ModelSpec
from wanlab.precision.denoiser import eager_network
from wanlab.precision.formats import check_blocks, get_format
from wanlab.precision.plan import AS_LOADED, FLOATS, IN_BLOCKS, KEEP, ROLE, Plan, Rule, is_float, load_plan

REGEX = "re:"
_BLOCK = re.compile(r"(?:^|\.)\w*blocks?\.(\d+)\.")
_TEXT = re.compile(
    r"\.attn2\.to_[kv]$|\.add_[qkv]_proj$|\.to_add_out$|\.ff_context\.|text_embedder\.linear_\d$"
    r"|caption_proj|text_proj|^context_embedder\.|\.pooler\.to_kv$"
)
_ONCE = re.compile(
    r"(?:^|\.)(?:time\w*|guidance\w*|ofs_embedding)\.(?!pooler\.to_kv|caption_proj)|time_proj$|(?:^|\.)(?:norm|adaln)\w*\.\w+$"
)


def quantizable_layers(
    network: torch.nn.Module, *, tokens: int | None = None, text_tokens: int = 512
) -> pd.DataFrame:
    """Every linear and convolution layer of a network, in the order of their names.

    Args:
        tokens: number of tokens of the video. With it operations of linear layers are counted: two per multiply-add, for
            every token (text token for the keys and values of cross-attention, once for the timestep), batch 1.
        text_tokens: number of tokens of the prompt, with padding.

    Returns:
        DataFrame: layer, kind, shape (weight, outputs first), parameters, block (number over all lists of blocks, see
        `wanlab.models.blocks`; None outside them), projection (the name inside the block); with `tokens` also flop and
        share_percent.
    """
    rows = []
    blocks = blocks_of(network)
    for name, module in _layers(network).items():
        number, projection = _place(name, blocks)
        rows.append(
            {
                "layer": name,
                "kind": next(kind for kind in ("Linear", "Conv2d", "Conv3d") if _is(module, kind)),
                "shape": tuple(module.weight.shape),
                "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
                "block": number,
                "projection": projection,
            }
        )
    frame = pd.DataFrame(rows, columns=["layer", "kind", "shape", "parameters", "block", "projection"])
    frame["block"] = frame["block"].astype("Int64")
    if tokens is not None:
        sizes = zip(frame["layer"], frame["shape"], strict=True)
        frame["flop"] = [operations(layer, shape, tokens, text_tokens) for layer, shape in sizes]
        frame["share_percent"] = 100 * frame["flop"] / frame["flop"].sum()
    return frame


def _place(name: str, blocks) -> tuple[int | None, str]:
    """Number of a layer's block and its name inside; of other networks than denoisers the innermost count."""
    if blocks:
        block, projection = split_path(name, blocks)
        return None if block is None else block.number, projection
    match = _BLOCK.search(name)
    return (int(match[1]), name[match.end() :]) if match else (None, name)


def layer_roles(network: torch.nn.Module) -> pd.DataFrame:
    """The role of every linear layer of a denoiser: layer, block (None outside the blocks), projection, role."""
    family = family_of_network(type(network).__name__)
    frame = quantizable_layers(network)
    frame = frame.loc[frame["kind"] == "Linear", ["layer", "block", "projection"]].reset_index(drop=True)
    return frame.assign(role=[family.role(layer) for layer in frame["layer"]])


def operations(layer: str, shape: tuple[int, ...], tokens: int, text_tokens: int = 512) -> int:
    """Operations of one layer in one forward of batch 1, counted as `quantizable_layers` does; `shape` is its weight's."""
    return 2 * _count(layer, tokens, text_tokens) * math.prod(shape)


def choose_layers(
    network: torch.nn.Module | Iterable[str],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the layers that match patterns, sorted with numbers as numbers.

    Args:
        network: network, or the names to choose from.
        include: names, globs (`blocks.*.ffn.net.2`; `*` crosses dots), or regular expressions after `re:`, which
            must match whole names; or roles of linear layers, such as `role:FFN`. `blocks.*` is every layer in the blocks.
            None takes every linear layer in the blocks.
        exclude: patterns of layers that are left out of these.

    Raises:
        WanlabError: a pattern that matches nothing, or nothing left.
    """
    module = network if isinstance(network, torch.nn.Module) else None
    known = _layers(module) if module is not None else dict.fromkeys(network)
    inside = _inside(module, known)
    if include is None and not inside:
        raise WanlabError("this network has no blocks with linear layers; name layers, or give '*' for all")
    roles = {} if module is None else dict(layer_roles(module)[["layer", "role"]].itertuples(index=False))
    chosen = {
        name
        for pattern in (inside if include is None else _list(include))
        for name in _matches(pattern, known, roles, inside)
    }
    chosen -= {name for pattern in _list(exclude) for name in _matches(pattern, known, roles, inside)}
    if not chosen:
        raise WanlabError("no layer is left; give patterns that include more or exclude less")
    return tuple(sorted(chosen, key=natural))


def layer_set_key(layers: Iterable[str]) -> str:
    """Hash of a set of layers, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(set(layers))).encode()).hexdigest()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts `blocks.2` before `blocks.10`."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in name.split(".")]


def _layers(network) -> dict[str, torch.nn.Module]:
    layers = {
        name: module
        for name, module in network.named_modules()
        if name and any(_is(module, kind) for kind in ("Linear", "Conv2d", "Conv3d"))
    }
    return {name: layers[name] for name in sorted(layers, key=natural)}


def _is(module, kind: str) -> bool:
    return isinstance(module, getattr(torch.nn, kind))


def _count(layer: str, tokens: int, text_tokens: int) -> int:
    return text_tokens if _TEXT.search(layer) else 1 if _ONCE.search(layer) else tokens


def _list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _inside(module, known) -> list[str]:
    """Linear layers in the blocks; of mere names those that begin with a list of blocks."""
    if module is not None:
        return list(linears(module, inside=True))
    return [name for name in known if re.match(r"\w*blocks\.\d+\.", name)]


def role_matches(pattern: str, role: str) -> bool:
    """Whether a pattern such as `role:FFN` or `role:*attention` names a role, whatever the case of its letters."""
    wanted = pattern.removeprefix(ROLE).strip().casefold()
    return pattern.startswith(ROLE) and fnmatch.fnmatchcase(role.casefold(), wanted)


def _matches(pattern: str, known, roles: Mapping[str, str], inside: Sequence[str]) -> list[str]:
    if pattern in known:
        return [pattern]
    if pattern == IN_BLOCKS and inside:
        starts = {".".join(name.split(".")[:2]) for name in inside}
        return [name for name in known if ".".join(name.split(".")[:2]) in starts]
    if pattern.startswith(ROLE):
        named = dict.fromkeys(roles.values())
        matches = [name for name in known if role_matches(pattern, roles.get(name, ""))]
        if not matches:
            known_roles = [f"{ROLE}{role}" for role in named]
            raise WanlabError(
                f"no layer has the role {pattern!r}{did_you_mean(pattern, known_roles)};"
                f" there is {', '.join(known_roles) or 'none, as only names are known'}"
            )
        return matches
    if pattern.startswith(REGEX):
        try:
            compiled = re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise WanlabError(f"layer pattern {pattern!r} is no regular expression: {error}") from error
        matches = [name for name in known if compiled.fullmatch(name)]
    else:
        matches = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        raise WanlabError(
            f"no layer matches {pattern!r}{did_you_mean(pattern, known)};"
            " see wanlab.precision.quantizable_layers for the names"
        )
    return matches


@dataclass(frozen=True, eq=False)
class Assignment:
    """A plan resolved to one format per layer of one model.

    Attributes:
        plan: plan that was assigned.
        default: the dtype of the networks, resolved: `"bf16"`, `"fp16"` or `"fp32"`.
        frame: one row per layer and range of steps: component, layer, block (None outside the blocks), projection, kind,
            shape (outputs first), parameters, first_step, last_step (inclusive; None where nothing
            changes with the step), format, rule (index in the plan; None is its default).
        reach: one row per rule and layer that it names: rule, component, layer, effect (`""` where it changes the layer,
            else `"overridden"` by a later rule, or `"already"` where earlier rules gave the same format).
    """

    plan: Plan
    default: str
    frame: pd.DataFrame
    reach: pd.DataFrame

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.frame["component"]))

    def formats(self, component: str, step: int | None = None) -> dict[str, str]:
        """Layer -> format, floats included.

        Raises:
            WanlabError: an unknown component; formats that change with the step, and no step is given; no such step.
        """
        rows = self._at(component, step)
        return dict(zip(rows["layer"], rows["format"], strict=True))

    def bands(self, component: str) -> list[tuple[int | None, int | None]]:
        """Ranges of steps, inclusive, in which nothing changes; `[(None, None)]` where nothing ever does."""
        rows = self._of(component).dropna(subset=["first_step"])
        if rows.empty:
            return [(None, None)]
        starts = sorted({0, *rows["first_step"].astype(int)})
        ends = [start - 1 for start in starts[1:]] + [self.plan.num_steps - 1]
        return list(zip(starts, ends, strict=True))

    def explain(self, component: str, layer: str, step: int | None = None) -> str:
        """The rule that gives a layer its format, in a sentence.

        Raises:
            WanlabError: as `formats`, or no such layer.
        """
        rows = self._of(component)
        if layer not in set(rows["layer"]):
            raise WanlabError(f"{component} has no layer {layer!r}{did_you_mean(layer, rows['layer'])}")
        rows = rows[rows["layer"] == layer]
        if step is not None:
            rows = rows[
                rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))
            ]
        return "; ".join(_sentence(self, row) for row in rows.itertuples())

    def without_effect(self, components: Collection[str] | None = None) -> list[str]:
        """A sentence for each rule that does not change some of the layers that it names.

        Args:
            components: components that count; None is all.
        """
        reach = self.reach if components is None else self.reach[self.reach["component"].isin(components)]
        lines = []
        for index, rows in reach.groupby("rule"):
            idle = rows["effect"].value_counts().drop("", errors="ignore")
            if idle.empty:
                continue
            words = {"overridden": "a later rule overrides", "already": "have this format without it"}
            why = ", ".join(f"{count} {words[name]}" for name, count in idle.items())
            many = "" if idle.sum() == len(rows) else f" on {idle.sum()} of {len(rows)} layers"
            lines.append(f"Rule {index} ({self.plan.rules[int(index)]}) has no effect{many}: {why}")
        return lines

    def cost(self, tokens: int | None = None, text_tokens: int = 512) -> pd.DataFrame:
        """Weights and work by component and format.

        A layer that changes with the step keeps the weights of each of its formats, and each step counts the same part of
        its work. Scales of blocks and channels are counted, biases are not: they stay as they are.

        Args:
            tokens, text_tokens: as `quantizable_layers` takes them; without tokens there is no count of operations.

        Returns:
            DataFrame: component, format, layers, parameters, size_bytes, bits_per_weight, weights_percent (share of the
            component's parameters), and with tokens flop and flop_percent.
        """
        return _cost(self, tokens, text_tokens)

    def share(self, most_bits: int = 8) -> float:
        """Fraction of linear weights held in formats of at most so many bits, at every step."""
        rows = self.frame[self.frame["kind"] == "Linear"]
        few = rows["format"].map(weight_bits) <= most_bits
        always = few.groupby([rows["component"], rows["layer"]]).all()
        parameters = rows.groupby(["component", "layer"])["parameters"].first()
        return float(parameters[always].sum() / parameters.sum())

    def _of(self, component: str) -> pd.DataFrame:
        rows = self.frame[self.frame["component"] == component]
        if rows.empty:
            raise WanlabError(
                f"plan {self.plan.name} covers no {component!r}{did_you_mean(component, self.components)};"
                f" it covers {', '.join(self.components)}"
            )
        return rows

    def _at(self, component: str, step: int | None) -> pd.DataFrame:
        rows = self._of(component)
        if step is None:
            if rows["first_step"].notna().any():
                raise WanlabError(
                    f"{component}'s formats change with the step in plan {self.plan.name}; give step="
                )
            return rows
        steps = self.plan.num_steps
        if steps is not None and not 0 <= step < steps:
            raise WanlabError(f"plan {self.plan.name} has steps 0 to {steps - 1}, not {step}")
        return rows[rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))]


def architecture(layers: pd.DataFrame) -> str:
    """Number and width of an expert's blocks, from `quantizable_layers`: `"40 blocks of width 5120"`; or empty."""
    blocks = layers[layers["block"].notna()]
    if blocks.empty:
        return ""
    return f"{int(blocks['block'].max()) + 1} blocks of width {blocks.iloc[0]['shape'][1]}"


def made_for(model) -> str:
    """`architecture` of a model's experts, for `Plan.made_for`; several, if they differ."""
    networks, _ = _networks(model)
    return ", ".join(dict.fromkeys(architecture(quantizable_layers(each)) for each in networks.values()))


def assign(plan: Plan, model, *, default: str | None = None) -> Assignment:
    """Resolve a plan to one format per layer of a model.

    Args:
        plan: plan from `load_plan`, `make_plan`, or a search.
        model: model from `wanlab.models.load`, whose loaded experts count, or component -> network. Rules for an expert
            that is not loaded are no mistake.
        default: dtype of the networks; needed for networks without a model where the plan names none.

    Raises:
        WanlabError: a rule that fits no layer, a layer that cannot be in its format, no expert.
    """
    networks, absent = _networks(model)
    dtype = default or (plan.default if plan.default != AS_LOADED else _dtype(networks))
    reached: set[int] = set()
    tables, reach = [], []
    for component, network in networks.items():
        layers = quantizable_layers(network)
        count = int(layers["block"].max()) + 1 if layers["block"].notna().any() else 0
        names = layer_names(network, layers)
        fits = [_matching(rule, component, names, count) for rule in plan.rules]
        _check_model(plan, component, layers, count, fits, {name for each in names for name in each.names})
        reached |= {index for index, names in enumerate(fits) if names}
        rows = [row for layer in layers.to_dict("records") for row in _ranges(plan, layer, fits, dtype)]
        tables.append(pd.DataFrame(rows).assign(component=component))
        for layer, own in zip(layers["layer"], _dtypes(network, layers["layer"], dtype), strict=True):
            reach += [(rule, component, layer, effect) for rule, effect in _effects(plan, layer, fits, own)]
    for index, rule in enumerate(plan.rules):
        elsewhere = any(fnmatch.fnmatchcase(component, rule.component) for component in absent)
        if index not in reached and not (elsewhere and not _meant(rule, networks)):
            raise WanlabError(_unmatched(plan, index, rule, networks))
    frame = pd.concat(tables, ignore_index=True)
    for row in frame[~frame["format"].map(is_float)].itertuples():
        check_blocks(row.shape, get_format(row.format).weight, f"{row.component}'s {row.layer}")
    columns = [
        "component", "layer", "block", "projection", "kind", "shape", "parameters",
        "first_step", "last_step", "format", "rule",
    ]  # fmt: skip
    types = {"block": "Int64", "first_step": "Int64", "last_step": "Int64", "rule": "Int64"}
    named = pd.DataFrame(reach, columns=["rule", "component", "layer", "effect"])
    return Assignment(plan, dtype, frame[columns].astype(types), named)


def assign_architecture(
    plan: str | os.PathLike | Plan, model: str | ModelSpec, default: str | None = None
) -> Assignment:
    """A plan on the architecture of a model; no weight is read.

    Args:
        model: registry name, local folder, or `ModelSpec`.
        default: dtype of the networks, `"fp32"`, `"fp16"` or `"bf16"`, where the plan names none; None takes bf16.

    Raises:
        WanlabError: as `load_plan`, `wanlab.models.get` and `assign`.
    """
    spec = model if isinstance(model, ModelSpec) else models.get(model)
    parts = {name: spec.part(spec.part_of(name)) for name in spec.components if name in EXPERTS}
    if not parts:
        raise WanlabError(f"{spec.name} has no expert; plans are for transformers of a denoising loop")
    plan = load_plan(plan)
    dtype = default or ("bf16" if plan.default == AS_LOADED else None)
    return assign(plan, {name: skeleton(part).to("meta") for name, part in parts.items()}, default=dtype)


def weight_bits(format: str) -> int:
    """Bits of one weight in a format, floats included; scales are not counted."""
    return ELEMENT_TYPES[format].bits if is_float(format) else get_format(format).weight.bits


def weight_bytes(shape: tuple[int, ...], format: str, scale_bytes: int = 2) -> int:
    """Bytes of a weight `[outputs, inputs, ...]` in a format, its scales included."""
    size = math.prod(shape) * weight_bits(format)
    if is_float(format):
        return size // 8
    numbers = get_format(format).weight
    scales = {"tensor": 1, "channel": shape[0], "block": math.prod(shape) // (numbers.block or 1)}
    return -(-size // 8) + scales[numbers.granularity] * scale_bytes


def _networks(model) -> tuple[dict, list[str]]:
    """The experts by component, and those of the model that are not loaded."""
    if isinstance(model, Mapping):
        networks, absent = dict(model), []
    else:
        experts = [name for name in model.spec.components if name in EXPERTS]
        networks = {name: eager_network(model, name) for name in experts if name in model.components}
        absent = [name for name in experts if name not in networks]
    if not networks:
        raise WanlabError("no expert to assign a plan to; plans are for transformers of a denoising loop")
    return networks, absent


def _meant(rule: Rule, networks: Mapping) -> bool:
    return any(fnmatch.fnmatchcase(component, rule.component) for component in networks)


def _dtype(networks: Mapping) -> str:
    names = {getattr(torch, name): short for short, name in FLOATS.items()}
    for component, network in networks.items():
        # Of the layers in the blocks: others, and modulation, stay in float32 in a bfloat16 network.
        layers = quantizable_layers(network)
        inside = [network.get_submodule(name) for name in layers["layer"][layers["block"].notna()]]
        kinds = {names[layer.weight.dtype] for layer in inside if layer.weight.dtype in names}
        if len(kinds) == 1:
            return kinds.pop()
        raise WanlabError(
            f"{component} has weights in {', '.join(sorted(kinds)) or 'no float'}; give default="
        )
    raise WanlabError("no network; give default=")


def _check_model(
    plan: Plan, component: str, layers: pd.DataFrame, count: int, fits: list[set[str]], known: set[str]
) -> None:
    """Refuse a plan that was selected for experts of another size, and a rule that fits and also names blocks or layers
    that the expert lacks.
    """
    own = architecture(layers)
    if plan.made_for and own not in plan.made_for.split(", "):
        raise WanlabError(
            f"plan {plan.name} was selected for {plan.made_for}, and {component} has {own}: select one for this model"
            " with 31_precision_plan, or remove made_for from the plan"
        )
    for index, rule in enumerate(plan.rules):
        absent = [f"block {number}" for number in sorted(rule.named_blocks()) if number >= count]
        absent += [
            name
            for name in rule.layers
            if re.fullmatch(r"\w*blocks\.\d+\.[\w.]+", name) and name not in known
        ]
        if absent and fits[index]:
            raise WanlabError(
                f"rule {index} of plan {plan.name} ({rule}) names {absent[0]}, and {component} has {count} blocks and no"
                " such layer: the plan is of another model; give one of this model, or name blocks as first N and last N"
            )


@dataclass(frozen=True)
class LayerNames:
    """What a plan may call a layer by.

    Attributes:
        layer: path of the layer. block: number of its block, None outside the blocks.
        names: its path, its name inside the block, and its path with the number of its block over all lists.
        role: its role in its family; empty for layers that are not linear.
    """

    layer: str
    block: int | None
    names: tuple[str, ...]
    role: str

    def fits(self, pattern: str) -> bool:
        """Whether a pattern of a rule names the layer."""
        if pattern.startswith(ROLE):
            return bool(self.role) and role_matches(pattern, self.role)
        if pattern == IN_BLOCKS:
            return self.block is not None
        return any(fnmatch.fnmatchcase(name, pattern) for name in self.names)


def layer_names(network: torch.nn.Module, layers: pd.DataFrame | None = None) -> list[LayerNames]:
    """What a plan may call each layer of a network by; `layers` are its `quantizable_layers`, where they are known."""
    layers = quantizable_layers(network) if layers is None else layers
    blocks, family = blocks_of(network), family_of_network(type(network).__name__)
    return [
        LayerNames(
            row.layer,
            None if pd.isna(row.block) else int(row.block),
            tuple(dict.fromkeys((row.layer, row.projection, numbered_path(row.layer, blocks)))),
            family.role(row.layer) if row.kind == "Linear" else "",
        )
        for row in layers.itertuples()
    ]


def _matching(rule: Rule, component: str, layers: Iterable[LayerNames], count: int) -> set[str]:
    if not fnmatch.fnmatchcase(component, rule.component):
        return set()
    numbers = rule.block_numbers(count)
    return {
        each.layer
        for each in layers
        if (numbers is None or each.block in numbers) and any(map(each.fits, rule.layers))
    }


def _ranges(plan: Plan, layer: dict, fits: list[set[str]], dtype: str) -> Iterable[dict]:
    """The layer once, or once per range of steps with one format."""
    applying = [index for index, names in enumerate(fits) if layer["layer"] in names]

    def at(step: int | None) -> tuple[str, int | None]:
        chosen = [i for i in applying if (s := plan.rules[i].step_numbers()) is None or step in s]
        if not chosen:
            return dtype, None
        format = plan.rules[chosen[-1]].format
        return dtype if format == KEEP else format, chosen[-1]

    if all(plan.rules[index].steps is None for index in applying):
        format, rule = at(None)
        yield layer | {"first_step": None, "last_step": None, "format": format, "rule": rule}
        return
    ranges: list[list] = []
    for step in range(plan.num_steps):
        choice = at(step)
        if ranges and ranges[-1][2:] == [*choice]:
            ranges[-1][1] = step
        else:
            ranges.append([step, step, *choice])
    if len({format for _, _, format, _ in ranges}) == 1 and len(ranges) == 1:
        ranges[0][:2] = [None, None]
    for first, last, format, rule in ranges:
        yield layer | {"first_step": first, "last_step": last, "format": format, "rule": rule}


def _dtypes(network, names: Iterable[str], dtype: str) -> list[str]:
    """The float of each layer before the rules; the network keeps some in float32."""
    default = getattr(torch, FLOATS[dtype])
    kept = (stored_dtype(network, f"{name}.weight", default) for name in names)
    return ["fp32" if kind is torch.float32 else dtype for kind in kept]


def _effects(plan: Plan, layer: str, fits: list[set[str]], own: str) -> Iterator[tuple[int, str]]:
    """Each rule that names a layer, and its effect there in its steps; see `Assignment.reach`."""
    applying = [index for index, names in enumerate(fits) if layer in names]
    steps = {index: plan.rules[index].step_numbers() for index in applying}
    by_step = any(numbers is not None for numbers in steps.values())
    every = range(plan.num_steps if by_step and plan.num_steps else 1)

    def format_of(index: int) -> str:
        return own if plan.rules[index].format == KEEP else plan.rules[index].format

    for index in applying:
        found = set()
        for step in every if steps[index] is None else steps[index]:
            at = [other for other in applying if steps[other] is None or step in steps[other]]
            before, last = [other for other in at if other < index], at[-1]
            if format_of(index) == (format_of(before[-1]) if before else own):
                found.add("already")
            else:
                found.add("" if format_of(last) == format_of(index) else "overridden")
        yield index, "" if "" in found else min(found, default="already")


def _unmatched(plan: Plan, index: int, rule: Rule, networks: Mapping) -> str:
    if not _meant(rule, networks):
        return (
            f"rule {index} of plan {plan.name} ({rule}) is for no component of this model"
            f"{did_you_mean(rule.component, networks)}; it has {', '.join(networks)}"
        )
    known = layer_names(next(iter(networks.values())))
    roles = [f"{ROLE}{role}" for role in dict.fromkeys(each.role for each in known if each.role)]
    if all(glob.startswith(ROLE) for glob in rule.layers):
        hint = next((text for glob in rule.layers if (text := did_you_mean(glob, roles))), "")
        return f"rule {index} of plan {plan.name} ({rule}) fits no layer{hint}; roles of this model are {', '.join(roles)}"
    short = sorted({name for each in known for name in each.names[1:2] or each.names}, key=natural)
    names = [*short, *(each.layer for each in known), *roles]
    hint = next((text for glob in rule.layers if (text := did_you_mean(glob, names))), "")
    return (
        f"rule {index} of plan {plan.name} ({rule}) fits no layer{hint};"
        " names are those of wanlab.precision.quantizable_layers"
    )


def _sentence(assignment: Assignment, row) -> str:
    when = "" if pd.isna(row.first_step) else f" at steps {row.first_step} to {row.last_step}"
    statement = f"{row.layer} of {row.component} is {row.format}{when}"
    if pd.isna(row.rule):
        return f"{statement} because no rule names it: the plan's default"
    rule = assignment.plan.rules[row.rule]
    return f"{statement} because of rule {row.rule} ({rule})" + (f": {rule.note}" if rule.note else "")


def _cost(assignment: Assignment, tokens: int | None, text_tokens: int) -> pd.DataFrame:
    frame = assignment.frame
    steps = assignment.plan.num_steps or 1
    spans = (frame["last_step"] - frame["first_step"] + 1).fillna(steps).astype(float) / steps
    by_format = frame.assign(part=spans).groupby(["component", "layer", "format"], as_index=False, sort=False)
    rows = by_format.agg(shape=("shape", "first"), parameters=("parameters", "first"), part=("part", "sum"))
    weights = rows["shape"].map(lambda shape: pd.Series(shape).prod())
    rows["weights"] = weights
    rows["size_bytes"] = [
        weight_bytes(shape, name) for shape, name in zip(rows["shape"], rows["format"], strict=True)
    ]
    if tokens is not None:
        rows["flop"] = [
            operations(layer, shape, tokens, text_tokens) * part
            for layer, shape, part in zip(rows["layer"], rows["shape"], rows["part"], strict=True)
        ]
    named = {"layers": ("layer", "count"), "weights": ("weights", "sum"), "size_bytes": ("size_bytes", "sum")}
    if tokens is not None:
        named["flop"] = ("flop", "sum")
    table = rows.groupby(["component", "format"], as_index=False, sort=False).agg(**named)
    table["bits_per_weight"] = 8 * table["size_bytes"] / table["weights"]
    totals = rows.drop_duplicates(["component", "layer"]).groupby("component")["weights"].sum()
    table["weights_percent"] = 100 * table["weights"] / table["component"].map(totals)
    if tokens is not None:
        table["flop_percent"] = 100 * table["flop"] / table.groupby("component")["flop"].transform("sum")
    return table
