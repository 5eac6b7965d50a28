"""LoRA files: their tensors matched to the layers of a network, and added to its weights.

The weight of a layer becomes W + strength * alpha / rank * up @ down, computed in float32 and rounded once to the dtype of
the network, so that a fused LoRA costs nothing in a step and engines and plans see ordinary weights. Of a layer `x` these
tensors are read, after an optional prefix such as `transformer.`, `diffusion_model.` or `lora_unet_`:
- `x.lora_A.weight` and `x.lora_B.weight` (PEFT, diffusers), `x.lora_down.weight` and `x.lora_up.weight` (Wan, LightX2V,
  kohya, musubi-tuner), with `x.alpha` where there is one; PEFT's alphas also from the metadata and adapter_config.json;
- `x.lora_B.bias`, which is scaled as the product is;
- `x.diff`, `x.diff_b` and `x.diff_m`: numbers that are added to a weight, a bias or a modulation table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from wanlab.core.errors import WanlabError
from wanlab.models.finite import is_finite
from wanlab.models.lora import PEFT_CONFIG, PEFT_FILE
from wanlab.models.networks import parameter_names
from wanlab.models.quantized import FLOAT_TYPES, FP8_TYPES
from wanlab.models.registry import read_json
from wanlab.models.spec import Lora, ModelSpec, Part
from wanlab.models.weights import open_file

RENAMINGS: dict[str, Callable[..., dict[str, Any]]] = {
    "WanTransformer3DModel": convert_wan_transformer_to_diffusers,
}
"""Class -> diffusers' renaming of the names in the model's own release."""
KOHYA_WORDS = (
    "self_attn", "cross_attn", "k_img", "v_img", "norm_q", "norm_k", "norm_k_img", "text_embedding", "time_embedding",
    "time_projection", "patch_embedding", "img_emb",
)  # fmt: skip
"""Names in Wan's release that have an underscore themselves, which kohya's names also have in place of every dot."""
NOT_READ = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoCon with a third matrix",
    "lora_embedding_": "a LoRA of an embedding",
    "set_weight": "a replaced weight",
    "reshape_weight": "a weight of another shape",
}
"""Beginning of the part of a name behind the layer -> the method that it is a sign of."""

_PREFIX = re.compile(
    r"(base_model\.model\.|model\.)?(diffusion_model\.|transformer(_\d+)?\.|text_encoder(_\d+)?\.|unet\.)?"
)
_KOHYA = re.compile(r"lora_(unet|transformer)_|lycoris_")
_ROLES = {
    "down": re.compile(r"\.(lora_A|lora_down|lora\.down)(\.\w+)?\.weight$"),
    "up": re.compile(r"\.(lora_B|lora_up|lora\.up)(\.\w+)?\.weight$"),
    "up_bias": re.compile(r"\.(lora_B|lora_up|lora\.up)(\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "weight": re.compile(r"\.diff$"),
    "bias": re.compile(r"\.diff_b$"),
    "modulation": re.compile(r"\.diff_m$"),
}
_DOTTED = re.compile(rf"({'|'.join(sorted(KOHYA_WORDS, key=len, reverse=True))})(?=_|$)|_")


@dataclass(frozen=True)
class Term:
    """What one LoRA adds to one tensor: `scale` times `up` @ `down`, or times `up` where there is no `down`.

    Attributes:
        up, down: names of tensors in the file.
    """

    up: str
    down: str
    scale: float


@dataclass(eq=False)
class _Opened:
    """One LoRA, matched to its network: terms by parameter, ranks and alphas for its note."""

    lora: Lora
    handle: Any
    terms: dict[str, list[Term]]
    ranks: set[int]
    alphas: set[float]
    effective: bool = False

    def add_to(self, name: str, weight: torch.Tensor) -> None:
        """Add its terms to a weight in float32, in place."""
        for term in self.terms.get(name, ()):
            added = self._read(term.up, weight.device)
            if term.down:
                added = added.flatten(1) @ self._read(term.down, weight.device).flatten(1)
            added = added.reshape(weight.shape).mul_(term.scale)
            self.effective = self.effective or bool(added.any())
            weight += added

    def _read(self, name: str, device: torch.device) -> torch.Tensor:
        value = self.handle.get_tensor(name).float()
        if not is_finite(value):
            raise WanlabError(f"{self.lora.file}: tensor {name} holds NaN or infinity; fetch the file again")
        return value.to(device)

    def note(self) -> str:
        """What was fused, for readers of a result."""
        numbers = {"rank": _range(self.ranks), "alpha": _range(self.alphas)}
        facts = [
            f"strength {self.lora.strength:g}",
            *(f"{name} {text}" for name, text in numbers.items() if text),
        ]
        what = f"LoRA {Path(self.lora.file).name} ({self.lora.digest}), {', '.join(facts)}"
        if not self.effective:
            return f"{self.lora.component}: {what}, has no effect: all that it adds is 0"
        return f"{self.lora.component}: {what}, fused into {_tensors(len(self.terms))}"


@dataclass(eq=False)
class Fusion:
    """The LoRAs of one network, ready to be added to its weights; falsy where there are none."""

    opened: list[_Opened] = field(default_factory=list)
    _changed: list[torch.Tensor] = field(default_factory=list)
    _total: int = 0

    def __bool__(self) -> bool:
        return bool(self.opened)

    def __contains__(self, name: str) -> bool:
        return any(name in each.terms for each in self.opened)

    def fused(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight with all that the LoRAs add to it, on its device; rounded once, to `dtype`.

        Raises:
            WanlabError: a tensor of a LoRA is NaN or infinite, or the sum is beyond the range of `dtype`.
        """
        before, after = weight.to(dtype), weight.to(torch.float32, copy=True)
        for each in self.opened:
            each.add_to(name, after)
        rounded = after.to(dtype)
        if not is_finite(rounded) and is_finite(before):
            file, short = self.opened[-1].lora.file, str(dtype).removeprefix("torch.")
            raise WanlabError(
                f'{file}: with it {name} is beyond the range of {short}; load the model with dtype="bfloat16", or give a'
                " smaller strength"
            )
        self._changed.append((rounded != before).sum())
        self._total += rounded.numel()
        return rounded

    def fuse(self, module: torch.nn.Module) -> None:
        """Add the LoRAs to the weights of a network in place.

        Raises:
            WanlabError: as `fused`.
        """
        parameters = parameter_names(module) if self else {}
        for name in [name for name in parameters if name in self]:
            weight = parameters[name].data
            weight.copy_(self.fused(name, weight, weight.dtype))  # in place: another name may share it

    def notes(self) -> list[str]:
        """What was fused and how much of the weights it changed, as sentences."""
        if not self:
            return []
        percent = 100 * int(torch.stack(self._changed).sum()) / self._total if self._total else 0.0
        component = self.opened[0].lora.component
        share = (
            f"{component}: the LoRA changed {percent:.3g} % of the numbers of {_tensors(len(self._changed))}"
        )
        if not percent and any(each.effective for each in self.opened):
            share = f"{component}: the LoRA has no effect: it adds less than the weights can hold"
        effective = any(each.effective for each in self.opened)
        return [*(each.note() for each in self.opened), *([share] if effective else [])]


def open_fusion(spec: ModelSpec, part: Part, module: torch.nn.Module) -> Fusion:
    """The LoRAs of a model that change one of its networks, checked against it; only headers and scales are read.

    Args:
        part: the network's part.
        module: the network, or its skeleton.

    Raises:
        WanlabError: an unreadable file, a method that is not read, or a tensor that fits no layer; the message names the
            first.
    """
    loras = [lora for lora in spec.loras if spec.part_of(lora.component) == part.name]
    return Fusion([_open(lora, part, module) for lora in loras])


def _open(lora: Lora, part: Part, module: torch.nn.Module) -> _Opened:
    path = Path(lora.file)
    handle = open_file(path)
    names = list(handle.keys())
    layers = _layers(names, lora.file)
    parameters = parameter_names(module)
    for name in names:
        if (kind := str(handle.get_slice(name).get_dtype())) not in FLOAT_TYPES | FP8_TYPES:
            raise WanlabError(f"{path}: tensor {name} is {kind}; give the LoRA in floating point")
    targets = _targets(layers, part.class_name, parameters)
    scale_of = _peft_scales(path, handle.metadata() or {})
    found = _Opened(lora, handle, {}, set(), set())
    sources: dict[tuple[str, str], str] = {}
    for layer, roles in layers.items():
        terms, rank, alpha = _terms(layer, roles, handle, scale_of, lora)
        found.ranks |= {rank} if rank else set()
        found.alphas |= {alpha} if alpha is not None else set()
        for leaf, term in terms.items():
            target = targets.get((layer, leaf))
            if target is None:
                raise WanlabError(
                    f"{path}: tensor {term.up} fits no layer of {lora.component} ({part.class_name}); it is a LoRA of"
                    " another model or component, or in names that are not read"
                )
            _check_shape(path, term, handle, target, tuple(parameters[target].shape), lora.component)
            role = "product" if term.down else "difference"
            if (target, role) in sources:
                raise WanlabError(
                    f"{path}: tensors {sources[target, role]} and {term.up} are both for {target} of {lora.component};"
                    " give one file for each component"
                )
            sources[target, role] = term.up
            found.terms.setdefault(target, []).append(term)
    if not found.terms:
        raise WanlabError(f"{path} has no tensors; it is no LoRA")
    return found


def _layers(names: Iterable[str], file: str) -> dict[str, dict[str, str]]:
    """Layer, as it is written -> role -> tensor."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        leaves = name.split(".")
        for sign, method in NOT_READ.items():
            if any(leaf.startswith(sign) for leaf in leaves[-2:]):
                raise WanlabError(
                    f"{file}: tensor {name} is a sign of {method}, which is not read; give a LoRA"
                )
        role = next((role for role, pattern in _ROLES.items() if pattern.search(name)), None)
        if role is None:
            raise WanlabError(
                f"{file}: tensor {name} is none of a LoRA (lora_A and lora_B, lora_down and lora_up, alpha, diff, diff_b);"
                " a whole network goes into the folder of its component"
            )
        layer = _ROLES[role].sub("", name)
        if role in layers.setdefault(layer, {}):
            raise WanlabError(f"{file}: layer {layer} has two tensors {role}; give one adapter a file")
        layers[layer][role] = name
    return layers


def _terms(
    layer: str,
    roles: Mapping[str, str],
    handle: Any,
    scale_of: Callable[[str, int], float | None],
    lora: Lora,
) -> tuple[dict[str, Term], int | None, float | None]:
    """What a layer's tensors add, by the leaf of the parameter; its rank and alpha."""
    terms, rank, alpha = {}, None, None
    if missing := {"down", "up"} - roles.keys():
        left = [roles[role] for role in ("down", "up", "up_bias", "alpha") if role in roles]
        if left:
            raise WanlabError(
                f"{lora.file}: tensor {left[0]} has no {' and no '.join(sorted(missing))} matrix beside it; fetch the file"
                " again"
            )
    else:
        rank = int(handle.get_slice(roles["down"]).get_shape()[0])
        scale = scale_of(layer, rank)
        if "alpha" in roles:
            value = handle.get_tensor(roles["alpha"]).float().flatten()
            if value.numel() != 1 or not is_finite(value):
                raise WanlabError(
                    f"{lora.file}: tensor {roles['alpha']} is no finite number; fetch the file again"
                )
            alpha = float(value)
            scale = alpha / rank
        elif scale is not None:
            alpha = scale * rank
        scale = lora.strength * (1.0 if scale is None else scale)
        terms["weight"] = Term(roles["up"], roles["down"], scale)
        if "up_bias" in roles:
            terms["bias"] = Term(roles["up_bias"], "", scale)
    for leaf in ("weight", "bias", "modulation"):
        if leaf in roles:
            if leaf in terms:
                raise WanlabError(
                    f"{lora.file}: layer {layer} has both a product and {roles[leaf]}; fetch it again"
                )
            terms[leaf] = Term(roles[leaf], "", lora.strength)
    return terms, rank, alpha


def _check_shape(
    path: Path, term: Term, handle: Any, target: str, shape: tuple[int, ...], component: str
) -> None:
    up = tuple(handle.get_slice(term.up).get_shape())
    down = tuple(handle.get_slice(term.down).get_shape()) if term.down else None
    if down is None:
        fits, has = math.prod(up) == math.prod(shape) and up[:1] == shape[:1], up
    else:
        fits = len(up) > 1 < len(down) and math.prod(up[1:]) == down[0] and len(shape) > 1
        fits = fits and (up[0], math.prod(down[1:])) == (shape[0], math.prod(shape[1:]))
        has = (up[0], *down[1:])
    if not fits:
        raise WanlabError(
            f"{path}: {term.up} changes a tensor of shape {list(has)}, {target} of {component} has {list(shape)}; it is a"
            " LoRA of another model or component"
        )


def _targets(
    layers: Iterable[str], class_name: str, parameters: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], str]:
    """(Layer as it is written, leaf) -> parameter, in the one convention of names that fits most layers.

    Not each layer in the convention that fits it: two names of Wan's release are diffusers' names of other layers.
    """
    stripped = {layer: _stripped(layer, parameters) for layer in layers}
    under = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in parameters}
    leaves = ("weight", "bias", "modulation")
    direct = {
        (layer, leaf): f"{under.get(name, name)}.{leaf}"
        for layer, name in stripped.items()
        for leaf in leaves
    }
    tables = [direct]
    if class_name in RENAMINGS:
        own: dict[str, tuple[str, str]] = {}
        for layer, name in stripped.items():
            dotted = name if "." in name else _DOTTED.sub(lambda match: match[1] or ".", name)
            own |= {f"{dotted}.{leaf}".removeprefix("."): (layer, leaf) for leaf in leaves}
        with suppress(AttributeError, IndexError, TypeError, ValueError):  # names stand in place of tensors
            tables.append({key: name for name, key in RENAMINGS[class_name](own).items()})
    tables = [{key: name for key, name in table.items() if name in parameters} for table in tables]
    return max(tables, key=lambda table: len({layer for layer, _ in table}))


def _stripped(layer: str, parameters: Mapping[str, torch.Tensor]) -> str:
    """A layer without the prefix that a program writes before it."""
    if "." not in layer:
        return _KOHYA.sub("", layer, count=1)
    bare = _PREFIX.sub("", f"{layer}.", count=1).removesuffix(".")
    return layer if any(name.startswith(f"{layer}.") for name in parameters) else bare


def _peft_scales(path: Path, metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """Scale of a layer of a rank by PEFT's settings, from the metadata or the file beside it; None where nothing says one.

    Raises:
        WanlabError: the settings cannot be read, or ask for DoRA.
    """
    config: dict[str, Any] = {}
    if path.name == PEFT_FILE and path.with_name(PEFT_CONFIG).is_file():
        config = read_json(path.with_name(PEFT_CONFIG))
    elif "lora_adapter_metadata" in metadata:
        try:
            stored = json.loads(metadata["lora_adapter_metadata"])
            config = {
                key.rpartition(".")[2] if key.count(".") == 1 else key: value for key, value in stored.items()
            }
        except (ValueError, AttributeError) as error:
            raise WanlabError(
                f"{path}: the metadata lora_adapter_metadata is no JSON object; save it again"
            ) from error
    if config.get("use_dora"):
        raise WanlabError(f"{path} is DoRA, which is not read; give a LoRA")
    default, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}

    def scale(layer: str, rank: int) -> float | None:
        named = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = next(named, default)
        if alpha is None:
            return None
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _range(values: Collection[float]) -> str:
    """`"64"`, or `"32 to 64"`; empty for no values."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)})) if values else ""
