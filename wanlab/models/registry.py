"""Registry of models: their names and facts, read without loading torch from configuration files, here or on the hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.paths import data, existing, locate
from wanlab.core.text import parse_json, read_text
from wanlab.models.families import family_of
from wanlab.models.lora import split_model, with_lora
from wanlab.models.spec import EXPERTS, Defaults, ModelSpec, Part, component_parts

NANO = "wan-nano"


def _hub_models() -> tuple[str, ...]:
    """Names of the packaged configurations, one file each: those of Wan2.2, then of Wan2.1, then the others."""
    files = resources.files(__package__).joinpath("configs").iterdir()
    found = [file.name.removesuffix(".json") for file in files if file.name.endswith(".json")]
    return tuple(
        sorted(found, key=lambda name: (not name.startswith("wan2.2"), not name.startswith("wan"), name))
    )


HUB_MODELS = _hub_models()
_TINY = "tiny"

# Entries of model_index.json that carry no network.
_NO_NETWORK = (
    "tokenizer",
    "scheduler",
    "guider",
    "image_processor",
    "feature_extractor",
    "video_processor",
    "processor",
)
# Diffusers does not mark video pipelines; this is part of their class names.
_VIDEO = re.compile(r"Video|Wan|3D|Mochi|Cosmos|Allegro|Motion|Temporal|Animate|SkyReels", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def names() -> tuple[str, ...]:
    """Names of models with weights that `get` accepts besides a path or a hub id; `tiny_names` has those without."""
    return (NANO, *HUB_MODELS)


@cache
def tiny_names() -> tuple[str, ...]:
    """Names of the tiny models, which `get` accepts too: one for each kind of pipeline, for `weights="random"` only.

    Their token geometry is that of the published models, their width and depth are the least that the classes allow.
    """
    files = resources.files(__package__).joinpath("configs", _TINY).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def is_known(name: str) -> bool:
    """Whether a model is one of `names()` or `tiny_names()`, whose facts come with wanlab: no network is asked for them."""
    return name in names() or name in tiny_names()


def get(name: str | os.PathLike) -> ModelSpec:
    """Facts of a model.

    Args:
        name: a registry name (`names()` and `tiny_names()`), a folder in diffusers layout, or a hub id such as
            `"Wan-AI/Wan2.2-I2V-A14B-Diffusers"`. Only a hub id that is not in the registry needs a network. A folder may
            hold a file `wanlab.json` with the model's default settings (docs/models.md). LoRAs that are fused into the
            weights follow after `+`: `"wan2.2-i2v-a14b+high.safetensors@expert_high+low.safetensors@expert_low:0.8"`.

    Raises:
        WanlabError: unknown name, missing folder or file, not a video pipeline, or unreachable hub; as
            `with_lora`.
    """
    base, loras = split_model(os.fspath(name))
    return with_lora(_found(base), loras)


def _found(name: str) -> ModelSpec:
    if name == NANO:
        return _from_folder(existing(nano_folder()), name=NANO)
    if is_known(name):
        return _packaged(name)
    folder = locate(name)
    if name and folder.is_dir():
        return _from_folder(folder.resolve(), name=folder.resolve().name)
    if name and folder.is_file():
        kind = "a GGUF file, which is not read" if folder.suffix.lower() == ".gguf" else "one file"
        if folder.suffix.lower() == ".safetensors":
            raise WanlabError(
                f"{name} is one file of weights; put it into transformer/ (or transformer_2/, vae/) of its model in the"
                " layout of diffusers, as the only weights there, and give the folder with model_index.json"
            )
        raise WanlabError(f"{name} is {kind}; give the folder of a diffusers pipeline, with model_index.json")
    for known in HUB_MODELS:
        if _packaged_data(known)["source"] == name:
            return _packaged(known)
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _from_hub(name)
    if os.sep in name:
        raise WanlabError(f"no folder {name}; give the folder that holds model_index.json")
    raise WanlabError(
        f"unknown model {name!r}{did_you_mean(name, names() + tiny_names())}; known: {', '.join(names())},"
        " a tiny model, or a diffusers folder or hub id"
    )


def reference(spec: ModelSpec) -> str:
    """The text of which `get` makes this spec again, its LoRAs included."""
    # A folder may have the name of a published model.
    own = is_known(spec.name) and get(spec.name).source == spec.source
    return "+".join([spec.name if own else spec.source, *map(str, spec.loras)])


def nano_folder() -> Path:
    """The folder of wan-nano: `$WANLAB_NANO`, or `data/wan-nano`.

    Raises:
        WanlabError: `$WANLAB_NANO` names no folder.
    """
    override = os.environ.get("WANLAB_NANO")
    if override and not Path(override).is_dir():
        raise WanlabError(
            f"{override} is missing; set WANLAB_NANO to the folder that holds wan-nano, or unset it"
        )
    return Path(override) if override else data("wan-nano")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WanlabError: the file is missing, unreadable or not a JSON object.
    """
    if not os.path.lexists(path):
        raise WanlabError(f"{path} is missing; the folder is incomplete, fetch the model again")
    try:
        value = parse_json(read_text(path, "json_mib"), path.name)
    except WanlabError as error:
        raise WanlabError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise WanlabError(f"{path} holds no JSON object; fetch the file again")
    return value


@cache
def _packaged_data(name: str) -> dict[str, Any]:
    folder = ("configs", _TINY) if name in tiny_names() else ("configs",)
    text = resources.files(__package__).joinpath(*folder, f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def _packaged(name: str) -> ModelSpec:
    data = _packaged_data(name)
    configs = data["configs"]
    spec = _assemble(name, data["source"], data["model_index"], lambda part: configs[part])
    defaults, shift = Defaults(**data["defaults"]), spec.defaults.flow_shift
    defaults = defaults if shift is None else replace(defaults, flow_shift=shift)
    return replace(spec, defaults=defaults, sizes_stated=True)


def _from_folder(folder: Path, *, name: str) -> ModelSpec:
    if not (folder / "model_index.json").is_file():
        raise WanlabError(f"{folder} has no model_index.json; give the top folder of a diffusers pipeline")
    index = read_json(folder / "model_index.json")

    def config(part: str) -> dict[str, Any]:
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        return read_json(folder / part / file)

    return _with_stated_defaults(folder, _assemble(name, str(folder), index, config))


def _from_hub(hub_id: str) -> ModelSpec:
    return replace(_from_folder(fetch_configs(hub_id), name=hub_id), source=hub_id)


def _assemble(
    name: str, source: str, index: Mapping[str, Any], config_of: Callable[[str], dict[str, Any]]
) -> ModelSpec:
    """A spec from model_index.json and the configuration of each part."""
    entries = _entries(index)
    networks = _networks(index)
    pipeline_class = _pipeline_class(source, index, networks)
    parts = {
        part: _part(source, part, library, kind, config_of(part))
        for part, (library, kind) in sorted(networks.items(), key=lambda item: _part_order(item[0]))
    }
    if "vae" not in parts:
        raise WanlabError(f"{source}: model_index.json names no vae; wanlab needs a latent video pipeline")
    denoiser = next((parts[key] for key in ("transformer", "transformer_2", "unet") if key in parts), None)
    if denoiser is None:
        raise WanlabError(f"{source}: model_index.json names no transformer or unet; nothing could denoise")
    scheduler = config_of("scheduler") if "scheduler" in entries else {}
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    family = family_of(pipeline_class)
    grid = family.grid(parts["vae"], denoiser)
    published = _published(source, networks, denoiser.config)
    own = replace(family.defaults, text_tokens=family.text_tokens(denoiser.config))
    return ModelSpec(
        name=name,
        source=source,
        pipeline_class=pipeline_class,
        components=tuple(component_parts(list(parts))),
        boundary_ratio=_boundary(index.get("boundary_ratio"), source),
        defaults=replace(published or own, flow_shift=shift),
        sizes_stated=published is not None,
        spatial_factor=grid.spatial_factor,
        temporal_factor=grid.temporal_factor,
        patch=grid.patch,
        latent_channels=grid.latent_channels,
        expand_timesteps=bool(index.get("expand_timesteps", False)),
        max_positions=denoiser.config.get("rope_max_seq_len"),
        size_step=grid.size_step,
        frame_step=grid.frame_step,
        parts=tuple(parts.values()),
        model_index=dict(index),
        scheduler_config=scheduler,
    )


def _entries(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Entries of model_index.json that name a class: part -> library and class."""
    return {
        key: value
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)
    }


def _networks(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Those of them that are networks, with weights of their own."""
    return {key: value for key, value in _entries(index).items() if not key.startswith(_NO_NETWORK)}


def _boundary(value: Any, source: str) -> float | None:
    """The boundary of model_index.json as a number; text that is a number is read.

    Raises:
        WanlabError: it is neither a finite number nor null.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "null", "none")):
        return None
    try:
        ratio = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        ratio = math.nan
    if not math.isfinite(ratio):
        raise WanlabError(
            f"{source}: boundary_ratio in model_index.json is {value!r}; give the share of the timesteps at which the"
            " experts switch, such as 0.9, or null"
        )
    return ratio


def _pipeline_class(source: str, index: Mapping[str, Any], networks: Mapping[str, list[str]]) -> str:
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise WanlabError(f"{source}: model_index.json names no pipeline class (_class_name); fetch it again")
    if not any(_VIDEO.search(text) for text in (class_name, *(value[1] for value in networks.values()))):
        raise WanlabError(
            f"{source} is a {class_name}, not a video pipeline; give a diffusers video pipeline"
        )
    # TI2V-5B is published as text-to-video; the image-to-video class runs the same files and takes the image.
    if class_name == "WanPipeline" and index.get("expand_timesteps"):
        return "WanImageToVideoPipeline"
    return class_name


def _part(source: str, name: str, library: str, class_name: str, config: Mapping[str, Any]) -> Part:
    stated = config.get("_class_name") or next(iter(config.get("architectures") or []), class_name)
    if stated == "WanModel":
        raise WanlabError(
            f"{source}: config.json of {name} is that of Wan's release; replace it by that of the same model in the layout"
            " of diffusers (on the hub: names that end in -Diffusers), the weights may stay"
        )
    if library == "diffusers" and stated != class_name:
        raise WanlabError(
            f"{source}: model_index.json says {name} is {class_name}, its config.json says {stated};"
            " the folder mixes two models, fetch it again"
        )
    return Part(name, library, class_name, dict(config))


def _part_order(part: str) -> tuple[int, str]:
    order = ("text_encoder", "image_encoder", "transformer", "unet", "vae")
    return next((i for i, prefix in enumerate(order) if part.startswith(prefix)), len(order)), part


def _with_stated_defaults(folder: Path, spec: ModelSpec) -> ModelSpec:
    """The spec with other defaults where the model's folder has a `wanlab.json` that states them."""
    path = folder / "wanlab.json"
    if not path.is_file():
        return spec
    stated = read_json(path).get("defaults", {})
    known = {field.name for field in fields(Defaults)}
    for key in stated:
        if key not in known:
            raise WanlabError(f"{path}: unknown default {key!r}{did_you_mean(key, known)}")
    try:
        defaults = msgspec.convert(asdict(spec.defaults) | stated, Defaults, strict=False)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{path}: {first_line(error)}") from error
    denoiser = spec.part(spec.part_of(next(name for name in spec.components if name in EXPERTS)))
    fixed = family_of(spec.pipeline_class).fixed_text_tokens(denoiser.config)
    if fixed and defaults.text_tokens != fixed:
        raise WanlabError(
            f"{path}: text_tokens is {defaults.text_tokens}, and a {denoiser.class_name} with pictures takes {fixed} alone"
        )
    sized = not {"height", "width", "frames"}.isdisjoint(stated)
    return replace(spec, defaults=defaults, sizes_stated=sized or spec.sizes_stated)


def _published(
    source: str, networks: Mapping[str, list[str]], denoiser: Mapping[str, Any]
) -> Defaults | None:
    """The default settings of the published model that this one is, so that a local copy has them too; None if it is none.

    A published model is recognised by its denoiser. Several may have the same one: of these the model whose
    repository is named in `source` counts, else those with the same networks (one expert or two). What still
    cannot be told apart, as Wan2.1's 480p and 720p, gets the settings of the first in `HUB_MODELS`.
    """
    found = [
        data for data in map(_packaged_data, HUB_MODELS) if _same(data["configs"]["transformer"], denoiser)
    ]
    pieces = re.split(r"[/\\]|--", source.lower())
    named = [data for data in found if data["source"].lower().rpartition("/")[2] in pieces]
    alike = [data for data in found if _networks(data["model_index"]) == networks]
    best = next(iter(named or alike or found), None)
    return Defaults(**best["defaults"]) if best else None


def _same(published: Mapping[str, Any], denoiser: Mapping[str, Any]) -> bool:
    """Whether a denoiser is of a published architecture.

    Every size must be stated and equal; other entries, which older files may lack, must be equal where they are
    stated. `sample_height` and its like are no part of the architecture.
    """

    def agrees(key: str, value: Any) -> bool:
        needed = isinstance(value, int) and not isinstance(value, bool)
        return denoiser.get(key) == value if needed or key in denoiser else True

    return all(agrees(key, value) for key, value in published.items() if not key.startswith("sample_"))


_TIMEOUT_S = 10
_CONFIGS = ["model_index.json", "*/config.json", "*/scheduler_config.json"]


def fetch_configs(hub_id: str) -> Path:
    """A local folder with the configuration files of a repository, without weights.

    Raises:
        WanlabError: no such repository, or the hub cannot be reached.
    """
    return _fetch(hub_id, _CONFIGS)


def fetch_folder(hub_id: str, parts: list[str]) -> Path:
    """A local folder with these parts (sub-folders) of a repository; downloads missing files.

    Without a network it returns the folder with the files that were downloaded before.

    Raises:
        WanlabError: no such repository, or the hub cannot be reached.
    """
    files = [f"{part}/*{kind}" for part in parts for kind in (".json", ".safetensors")]
    files += [f"{part}/*.model" for part in parts if part.startswith("tokenizer")]
    return _fetch(hub_id, [*_CONFIGS, *files])


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=_TIMEOUT_S))
    except GatedRepoError as error:
        raise WanlabError(
            f"{hub_id} asks for permission; accept its terms on the hub and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise WanlabError(
            f"the hub has no repository {hub_id}; check the spelling, or log in: hf auth login"
        ) from error
    except Exception as error:  # the client passes on errors of several HTTP libraries
        raise WanlabError(
            f"cannot fetch {hub_id} from the hub ({_cause(error)}); check the network, give a local folder,"
            ' or use weights="random" with a registry name'
        ) from error


def _cause(error: BaseException) -> str:
    """One line of the innermost cause, which describes the network failure."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
