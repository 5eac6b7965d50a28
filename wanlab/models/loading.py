"""Loading a model: weight files, memory checks, load times, and a report of what was loaded."""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.models import weights as ckpt
from wanlab.models.device import synchronise
from wanlab.models.fusion import open_fusion
from wanlab.models.lora import with_lora
from wanlab.models.networks import fill_random, needed_bytes, network_class, skeleton
from wanlab.models.pipeline import LoadReport, Model, PartLoad, idle_expert
from wanlab.models.registry import fetch_folder, get, tiny_names
from wanlab.models.spec import ModelSpec
from wanlab.models.standins import image_processor_for, tokenizer_for
from wanlab.models.weights import check_room


def cached_fraction(files: Iterable[Path]) -> float | None:
    """Share of the files' pages that are in the page cache, 0 to 1, from mincore(2); None where it is not known."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    cached = total = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            failed = mincore(view.ctypes.data, size, pages.ctypes.data)
            del view  # the mapping cannot be closed while an array refers to it
        if failed:
            return None
        cached += int((pages & 1).sum())
        total += len(pages)
    return cached / total if total else None


def drop(files: Iterable[Path]) -> bool:
    """Ask the kernel to drop these files' pages (posix_fadvise); False where the system has no such call.

    The kernel may refuse, for pages that another process maps: check with `cached_fraction` afterwards.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the kernel keeps pages that are not yet written to disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


DTYPES = ("float32", "bfloat16", "float16")
# VAEs of diffusers that refuse a picture in one piece; their defaults are without tiles.
_TILES_ONLY = ("AutoencoderKLAllegro",)


def load(
    name_or_spec: str | ModelSpec,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: str = "pretrained",
    seed: int = 0,
    components: Sequence[str] | None = None,
    lora: str | Sequence[str] | None = None,
) -> Model:
    """A model with its weights on a device, ready to generate.

    Weights are read tensor by tensor from safetensors files, cast and moved to the device, so that the host
    never holds a whole network; the result equals diffusers' `from_pretrained(torch_dtype=dtype)`. Headers, names,
    shapes and free memory are checked before anything is allocated.

    Args:
        name_or_spec: a name, folder or hub id as for `get`, or a spec.
        device: "auto" (cuda if there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (bfloat16 on cuda, float32 on cpu), "float32", "bfloat16", "float16" or a torch dtype.
        weights: "pretrained", or "random": the true architecture with weights drawn on the device from `seed`.
        seed: seed of the random weights.
        components: load only the networks of these components, e.g. `("expert_high",)`; all by default.
        lora: LoRAs that are fused into the weights, as `wanlab.models.lora.read_loras` takes them, e.g.
            `"low.safetensors@expert_low:0.8"`; by default those of the spec.

    Raises:
        WanlabError: unknown name or option, missing, truncated or mismatched files, too little memory,
            or an unreachable hub.
    """
    spec = with_lora(name_or_spec if isinstance(name_or_spec, ModelSpec) else get(name_or_spec), lora)
    if weights not in ("pretrained", "random"):
        raise WanlabError(f'weights is "pretrained" or "random", not {weights!r}')
    place, kind = resolve(device, dtype)
    short = str(kind).removeprefix("torch.")
    part_names = _wanted_parts(spec, components)
    folder = _folder(spec, part_names, weights)
    pipeline_cls = _pipeline_class(spec)
    for name in part_names:
        network_class(spec.part(name))  # imports its module, so that the time of the import is not measured

    start = time.perf_counter()
    modules = {name: skeleton(spec.part(name), kind) for name in part_names}
    notes: list[str] = []
    checkpoints: dict[str, ckpt.Checkpoint] = {}
    contents: dict[str, ckpt.Contents] = {}
    if weights == "pretrained":
        for name, module in modules.items():
            found = ckpt.open_checkpoint(folder / name, short, spec.part(name).class_name)
            found = ckpt.fitted(found, module)
            contents[name] = ckpt.check(found, module, spec.part(name).config)
            lines = [*found.notes, *contents[name].notes(short)]
            notes += [f"{name}: {line}" for line in lines]
            checkpoints[name] = found
    fusions = {name: open_fusion(spec, spec.part(name), module) for name, module in modules.items()}
    sizes = {name: needed_bytes(module, kind) for name, module in modules.items()}
    check_room(spec.name, sizes, place, short)
    files = [file for checkpoint in checkpoints.values() for file in checkpoint.files]
    cached = cached_fraction(files) if files else None

    loads = []
    for name, module in modules.items():
        paths = checkpoints[name].files if checkpoints else ()
        part_cached = cached_fraction(paths) if paths else None
        part_start = time.perf_counter()
        if checkpoints:
            ckpt.fill(
                module, checkpoints[name], contents[name], device=place, dtype=kind, changes=fusions[name]
            )
        else:
            fill_random(module, name=name, device=place, dtype=kind, seed=seed)
            fusions[name].fuse(module)
        synchronise(place)
        read = checkpoints[name].size_bytes if checkpoints else 0
        loads.append(PartLoad(name, _ms(part_start), read, sizes[name], part_cached))
        notes += fusions[name].notes()

    extras, more = _without_weights(spec, folder, part_names)
    pipeline = _pipeline(pipeline_cls, spec, modules, extras)
    notes += more
    if weights == "random":
        notes.append(f"random weights from seed {seed}: right in time and memory, meaningless in content")
    ratio = spec.boundary_ratio
    if ratio is None or not 0 < ratio <= 1:
        notes.append(idle_expert(pipeline, spec, spec.defaults.steps))
    notes = [note for note in notes if note]
    report = LoadReport(weights, _ms(start), tuple(loads), cached, tuple(notes))

    return Model(spec=spec, pipeline=pipeline, device=place, dtype=kind, load=report, notes=notes)


def load_times(
    name_or_spec: str | ModelSpec,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    components: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Load twice, cold and then warm; the model is deleted after each load.

    Before the first load the kernel is asked to drop the files from its page cache. It may refuse, so the column `state`
    gives the state that was observed: "cold", "warm", "partly cached" or "unknown". Disks have caches of
    their own. Rows: those of `LoadReport.frame`, with `load` "first" and "second".

    Raises:
        WanlabError: as for `load`.
    """
    spec = name_or_spec if isinstance(name_or_spec, ModelSpec) else get(name_or_spec)
    part_names = _wanted_parts(spec, components)
    folder = _folder(spec, part_names, "pretrained")
    short = str(resolve(device, dtype)[1]).removeprefix("torch.")
    files = [file for name in part_names for file in ckpt.open_checkpoint(folder / name, short).files]
    gc.collect()  # an earlier model may still map the files
    drop(files)
    frames = []
    for label in ("first", "second"):
        report = load(spec, device=device, dtype=dtype, components=components).load
        frames.append(report.frame().assign(load=label, state=report.state))
        gc.collect()
    frame = pd.concat(frames, ignore_index=True)
    return frame[["load", "state", *[column for column in frame.columns if column not in ("load", "state")]]]


def resolve(device: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, torch.dtype]:
    """The device and dtype for names and "auto".

    Raises:
        WanlabError: no such device on this machine, or no such dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise WanlabError(f'no device {device!r}; use "auto", "cpu", "cuda" or "cuda:N"') from error
    if place.type not in ("cpu", "cuda"):
        raise WanlabError(f'device {place} is not supported; use "auto", "cpu", "cuda" or "cuda:N"')
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise WanlabError(f'device {place} is not here ({count} CUDA devices); use "auto" or "cpu"')
        place = torch.device("cuda", place.index or 0)
    if dtype == "auto":
        return place, torch.bfloat16 if place.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WanlabError(
            f"weights cannot be loaded in {name!r}{did_you_mean(name, DTYPES)}; use {', '.join(DTYPES)}"
        )
    return place, getattr(torch, name)


def _wanted_parts(spec: ModelSpec, components: Sequence[str] | None) -> list[str]:
    if components is None:
        return [part.name for part in spec.parts]
    if isinstance(components, str):
        components = (components,)
    if not components:
        raise WanlabError(f"components is empty; name some of {', '.join(spec.components)}, or leave it out")
    chosen = {spec.part_of(component) for component in components}
    return [part.name for part in spec.parts if part.name in chosen]


def _folder(spec: ModelSpec, part_names: list[str], weights: str) -> Path | None:
    """The folder of the files; None when nothing is on this machine and nothing is needed."""
    if spec.is_local:
        return Path(spec.source)
    if weights == "random":
        return None
    if spec.name in tiny_names():
        raise WanlabError(f'{spec.name} has no weights to download; load it with weights="random"')
    others = [key for key in spec.model_index if key.startswith(("tokenizer", "scheduler"))]
    return fetch_folder(spec.source, [*part_names, *others])


def _pipeline_class(spec: ModelSpec) -> type:
    cls = getattr(diffusers, spec.pipeline_class, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise WanlabError(
            f"{spec.source}: the installed diffusers {diffusers.__version__} has no pipeline"
            f" {spec.pipeline_class}{did_you_mean(spec.pipeline_class, dir(diffusers))}"
        )
    return cls


def _without_weights(
    spec: ModelSpec, folder: Path | None, part_names: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Tokenizers, scheduler and processors; substitutes and notes where the files are not on this machine."""
    extras: dict[str, Any] = {}
    notes: list[str] = []
    for name, entry in spec.model_index.items():
        if not isinstance(entry, list) or None in entry or any(part.name == name for part in spec.parts):
            continue
        library, class_name = entry
        text_encoder = name.replace("tokenizer", "text_encoder")
        if name.startswith("tokenizer") and text_encoder not in part_names:
            continue
        cls = getattr(importlib.import_module(library), class_name, None)
        if name == "scheduler":
            if cls is None:
                raise WanlabError(f"{spec.source}: the installed {library} has no scheduler {class_name}")
            extras[name] = cls.from_config(dict(spec.scheduler_config))
        elif folder is not None:
            extras[name] = _from_files(folder / name, library, cls)
        elif name.startswith("tokenizer"):
            extras[name] = tokenizer_for(spec, name)
            notes.append(f"{name}: the real one is not on this machine; words are hashed to ids instead")
        elif name.startswith(("image_processor", "feature_extractor")):
            extras[name] = image_processor_for(spec, cls)
        elif library == "diffusers" and cls is not None:  # such as a guider: its defaults
            extras[name] = cls()
    return extras, notes


def _from_files(folder: Path, library: str, cls: Any) -> Any:
    if not folder.is_dir():
        raise WanlabError(f"{folder} is missing; the model is incomplete, fetch it again")
    if cls is None and library == "transformers":
        cls = AutoTokenizer
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizer libraries raise bare exceptions for a broken file
        raise WanlabError(f"{folder} cannot be read ({first_line(error, 160)}); fetch it again") from error


def _pipeline(cls: Any, spec: ModelSpec, modules: dict[str, Any], extras: dict[str, Any]) -> Any:
    accepted = inspect.signature(cls.__init__).parameters
    arguments: dict[str, Any] = dict.fromkeys(
        name
        for name, parameter in accepted.items()
        if name != "self" and parameter.default is parameter.empty
    )
    arguments |= {
        key: value
        for key, value in spec.model_index.items()
        if key in accepted and not isinstance(value, list) and not key.startswith("_")
    }
    if "boundary_ratio" in arguments:  # a number also where the file has text
        arguments["boundary_ratio"] = spec.boundary_ratio
    arguments |= {key: value for key, value in (modules | extras).items() if key in accepted}
    unknown = [key for key in modules if key not in accepted]
    if unknown:
        raise WanlabError(
            f"{spec.source}: {cls.__name__} has no part {unknown[0]!r}; model_index.json names a wrong class"
        )
    pipeline = cls(**arguments)
    if type(getattr(pipeline, "vae", None)).__name__ in _TILES_ONLY:
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
