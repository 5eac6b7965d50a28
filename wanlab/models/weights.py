"""Weights: reading checkpoints, checks of free memory, and copies on the host."""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import file_kind
from wanlab.core.text import convert
from wanlab.models import quantized
from wanlab.models.device import synchronise
from wanlab.models.networks import assign, finish, parameter_names, stored_dtype, tied_names
from wanlab.models.registry import read_json
from wanlab.models.shapes import latent_shape
from wanlab.models.spec import ModelSpec

GIB = 2**30
# Reserve for the context and workspaces of CUDA libraries, or for Python and its packages.
RESERVE_BYTES = {"cuda": GIB, "cpu": GIB // 4}


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now: free GPU memory, or available host memory.

    Host memory is limited by the control group, where there is one.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_control_group()])


def check_room(name: str, needed: Mapping[str, int], device: torch.device, dtype: str) -> None:
    """Refuse weights that do not fit into memory.

    Args:
        name: name of the model, for the message.
        needed: part -> bytes of its weights.
        device: device that gets the weights.
        dtype: dtype of the weights, for the message.

    Raises:
        WanlabError: too little is free; the message gives both figures in GiB and what to do.
    """
    reserve = RESERVE_BYTES.get(device.type, GIB)
    free, total = free_bytes(device), sum(needed.values())
    if total + reserve <= free:
        return
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in needed.items())
    smaller = "" if dtype in ("bfloat16", "float16") else ' use dtype="bfloat16",'
    raise WanlabError(
        f"{name} in {dtype} needs {(total + reserve) / GIB:.1f} GiB on {device} ({parts}, reserve"
        f" {reserve / GIB:.2f}) and {free / GIB:.1f} GiB are free;{smaller} load fewer networks with"
        " components=(...), or take a smaller model (wan2.2-ti2v-5b, wan-nano)"
    )


def check_tensor(
    what: str, shape: Sequence[int], item_bytes: int, device: torch.device | None = None
) -> None:
    """Refuse a tensor that does not fit into free memory, before it is allocated.

    Raises:
        WanlabError: too little is free; the message gives both figures.
    """
    needed, free = math.prod(shape) * item_bytes, free_bytes(device or torch.device("cpu"))
    if needed > free:
        raise WanlabError(
            f"{what} of {'x'.join(map(str, shape))} needs {needed / GIB:,.1f} GiB and {free / GIB:.1f} GiB are free; give a"
            " smaller size"
        )


def check_size(spec: ModelSpec, size: Mapping[str, int], device: torch.device, item_bytes: int) -> None:
    """Refuse a video whose tensors cannot fit into free memory, whatever the engine, before any is allocated.

    Counted are a lower bound: the video in float32 on the host, and on the device the decoded video or the queries, keys
    and values of one layer of an expert, whichever is larger.

    Args:
        size: height and width in pixels, frames.
        item_bytes: bytes of one number of the model's dtype.

    Raises:
        WanlabError: as `latent_shape`; too little is free: the message gives both figures.
    """
    height, width, frames = size["height"], size["width"], size["frames"]
    tokens = latent_shape(spec, height, width, frames).tokens
    config = next((part.config for part in spec.parts if part.name.startswith("transformer")), {})
    hidden = int(config.get("num_attention_heads") or 0) * int(config.get("attention_head_dim") or 0)
    numbers = 3 * frames * height * width
    needed = {"host": 4 * numbers}
    place = "host" if device.type == "cpu" else str(device)
    needed[place] = needed.get(place, 0) + item_bytes * max(numbers, 3 * tokens * hidden)
    for name, size_bytes in needed.items():
        free = free_bytes(torch.device("cpu") if name == "host" else device)
        if size_bytes > free:
            raise WanlabError(
                f"{spec.name}: a video of {height}x{width} with {frames} frames needs at least {size_bytes / GIB:,.1f} GiB"
                f" on the {name} and {free / GIB:.1f} GiB are free; give a smaller size or fewer frames"
            )


def _control_group() -> list[int]:
    """Remainder of the memory limit of this process's control group (version 2), if there is one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [limit - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))]


_CAST_ON_HOST_BYTES = 2**29
_BASENAMES = ("diffusion_pytorch_model", "model")
_PREFIX = re.compile(r"(model\.)?(diffusion_model\.)?")
_OWN_NAMES: dict[str, tuple[str, Callable[..., dict[str, Any]] | None]] = {
    "WanTransformer3DModel": ("head.modulation", convert_wan_transformer_to_diffusers),
    "WanVACETransformer3DModel": ("head.modulation", None),
    "WanAnimateTransformer3DModel": ("head.modulation", None),
    "AutoencoderKLWan": ("decoder.middle.0.residual.0.gamma", convert_wan_vae_to_diffusers),
    "UMT5EncoderModel": ("token_embedding.weight", None),
}
"""Class -> a tensor that only Wan's release calls so, and diffusers' conversion of the names, where it has one."""


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one part: which tensor lies in which file.

    Attributes:
        where: tensor -> its file.
        shapes, dtypes: tensor -> its shape, and its dtype as safetensors names it.
        variant: name of the variant that was chosen, e.g. `"fp16"`; empty for files without one.
        notes: sentences about a choice between files, and about names.
        renamed: tensor -> its name in the file, where tensors are renamed.
        naming: whose names these are, e.g. `"Wan's own names"`.
    """

    folder: Path
    files: tuple[Path, ...]
    where: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    size_bytes: int
    variant: str = ""
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    naming: str = ""

    def in_file(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self.renamed.get(name, name)

    @property
    def title(self) -> str:
        """The folder, and how its tensors are called in messages."""
        return f"{self.folder} (tensors renamed from {self.naming})" if self.renamed else str(self.folder)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A function that reads one tensor by its name, on the host; files stay open inside the block."""
        with ExitStack() as stack:
            opened = functools.cache(lambda file: stack.enter_context(open_file(file)))
            yield lambda name: opened(self.where[name]).get_tensor(self.in_file(name))


def open_checkpoint(folder: Path, dtype: str = "", network: str = "") -> Checkpoint:
    """Find and check the weight files of one part, reading headers only.

    Accepts one file, or shards named by an index, also of a variant such as `fp16`. Files without a variant are preferred,
    then the variant of `dtype`. A file must be as long as its header says. Tensors with the names of Wan's release are
    renamed to those of diffusers.

    Args:
        network: class of the network, e.g. `"WanTransformer3DModel"`; without one nothing is renamed.

    Raises:
        WanlabError: no weights, a missing shard, a truncated or corrupt file, an index that names a tensor
            that is not in its file, or Wan's own names of a network for which diffusers has no renaming.
    """
    if not folder.is_dir():
        raise WanlabError(f"{folder} is missing; the model is incomplete, fetch it again")
    variants = _variants(folder)
    first = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(dtype, "")
    variant = min(variants, key=lambda name: (name != "", name != first, name))
    index, files = _files(folder, variants[variant])
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        with open_file(file) as handle:
            for name in handle.keys():  # noqa: SIM118, the handle is no mapping
                entry = handle.get_slice(name)
                where[name], shapes[name], dtypes[name] = (
                    file,
                    tuple(entry.get_shape()),
                    str(entry.get_dtype()),
                )
    for name, listed in index.items():
        if where.get(name) != folder / listed:
            raise WanlabError(
                f"{folder / listed} lacks tensor {name} that the index promises; fetch the file again"
            )
    notes = []
    if len(variants) > 1:
        rest = ", ".join(name or "without a variant" for name in variants if name != variant)
        notes.append(
            f"of several variants of the weights, {variant or 'the one without a name'} is used (also there: {rest})"
        )
    known = tuple(f"{base}{end}" for base in _BASENAMES for end in ".-")
    others = sorted(
        path for path in {*folder.glob("*.safetensors")} - {*files} if not path.name.startswith(known)
    )
    if others:
        notes.append(f"{files[0].name} is read, {others[0].name} beside it is not")
    size = sum(file.stat().st_size for file in files)
    found = Checkpoint(folder, tuple(files), where, shapes, dtypes, size, variant, tuple(notes))
    return _renamed(found, network) if network else found


def _renamed(checkpoint: Checkpoint, network: str) -> Checkpoint:
    """The checkpoint with the names of diffusers, where it has Wan's own; ComfyUI and others write a prefix before them."""
    sign, conversion = _OWN_NAMES.get(network, ("", None))
    own = {_PREFIX.sub("", name, count=1): name for name in checkpoint.where}
    if sign not in own:
        return checkpoint
    renamed: dict[str, str] = {}
    # Names stand in place of tensors: what is not only renamed stops the conversion, what it does not know may coincide.
    with suppress(AttributeError, IndexError, TypeError, ValueError):
        renamed = conversion(own) if conversion else {}
    if len(renamed) != len(checkpoint.where):
        raise WanlabError(
            f"{checkpoint.folder}: the tensors have Wan's own names, which are not read for this {network}; take the folder"
            f" {checkpoint.folder.name} of the same model in the layout of diffusers (on the hub: names that end in"
            " -Diffusers)"
        )
    naming = "Wan's own names"
    note = f"{len(renamed)} tensors renamed from {naming}"
    return replace(_with_names(checkpoint, renamed, naming), notes=(*checkpoint.notes, note))


def fitted(checkpoint: Checkpoint, module: torch.nn.Module) -> Checkpoint:
    """The checkpoint with the names that the installed transformers has for its tensors.

    Its releases renamed the parts of many networks (`vision_model.` before the layers of CLIP, `language_model.model.`
    before those of Llava); files keep the names of their day, and transformers writes those again.
    """
    expected = parameter_names(module)
    if not isinstance(module, PreTrainedModel) or checkpoint.where.keys() >= expected.keys():
        return checkpoint
    rules = [rule for rule in get_model_conversion_mapping(module) if isinstance(rule, WeightRenaming)]
    state = module.state_dict()
    stored_names = {
        rename_source_key(stored, rules, [], module.base_model_prefix, state)[0]: stored
        for stored in checkpoint.where
    }
    found = len(expected.keys() & stored_names.keys())
    if len(stored_names) != len(checkpoint.where) or found <= len(expected.keys() & checkpoint.where.keys()):
        return checkpoint
    return _with_names(checkpoint, stored_names, "the names of another release of transformers")


def _with_names(checkpoint: Checkpoint, stored_names: Mapping[str, str], naming: str) -> Checkpoint:
    """The checkpoint whose tensors are called by the keys of `stored_names`."""
    return replace(
        checkpoint,
        where={name: checkpoint.where[stored] for name, stored in stored_names.items()},
        shapes={name: checkpoint.shapes[stored] for name, stored in stored_names.items()},
        dtypes={name: checkpoint.dtypes[stored] for name, stored in stored_names.items()},
        renamed=dict(stored_names),
        naming=naming,
    )


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds of a network, after the checks.

    Attributes:
        sources: parameter -> its name in the files.
        encodings: parameter -> how it is quantized, for those that are.
        unused: tensors that neither the network nor a format needs.
        bare_fp8: number of FP8 weights without scales.
    """

    sources: dict[str, str]
    encodings: dict[str, quantized.Encoding]
    unused: tuple[str, ...]
    bare_fp8: int

    def notes(self, dtype: str) -> list[str]:
        """What is read in another form than the network has it, and what is not read, as sentences."""
        lines = quantized.described(self.encodings, len(self.sources), self.bare_fp8, dtype)
        if self.unused:
            lines.append(f"{len(self.unused)} tensors of the files are not used, e.g. {self.unused[0]}")
        return lines


def check(
    checkpoint: Checkpoint, module: torch.nn.Module, config: Mapping[str, Any] | None = None
) -> Contents:
    """Compare a checkpoint with its network, before anything is allocated.

    Args:
        config: the part's config.json, which may name a format of quantization.

    Raises:
        WanlabError: a tensor is missing or has another shape, a format of quantization that is not read, or a tensor
            that belongs to a layer of the network and is not used.
    """
    parameters = parameter_names(module)
    sources = _sources(checkpoint, module)
    floating = {name: source for name, source in sources.items() if parameters[name].is_floating_point()}
    with checkpoint.reader() as read:
        encodings = quantized.encodings(
            checkpoint.dtypes, checkpoint.shapes, floating, config or {}, read, checkpoint.title
        )
    missing = [name for name in parameters if name not in sources]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WanlabError(
            f"{checkpoint.title} lacks tensor {missing[0]}{more} of {type(module).__name__};"
            " is it another model's? Else fetch it again"
        )
    for name, tensor in parameters.items():
        packed = encodings[name].shape if name in encodings else None
        actual = packed or checkpoint.shapes[sources[name]]
        if actual != tuple(tensor.shape):
            raise WanlabError(
                f"{checkpoint.where[sources[name]]}: tensor {checkpoint.in_file(sources[name])} has shape {list(actual)},"
                f" config.json asks for {list(tensor.shape)}; weights and config.json belong to two models"
            )
    needed = set(sources.values()) | set(tied_names(module))
    needed = needed.union(*map(quantized.used, encodings.values()))
    unused = sorted(name for name in set(checkpoint.where) - needed if not quantized.is_known(name))
    for name in unused:
        if _belongs_to_a_layer(name, checkpoint.dtypes[name], module):
            raise WanlabError(
                f"{checkpoint.where[name]}: tensor {checkpoint.in_file(name)} belongs to a layer of"
                f" {type(module).__name__} and is not used: the weights are in a format that is not read, or of another"
                " model; give those of the model in config.json"
            )
    bare = sum(
        checkpoint.dtypes[source] in quantized.FP8_TYPES and name not in encodings
        for name, source in floating.items()
    )
    return Contents(sources, encodings, tuple(map(checkpoint.in_file, unused)), bare)


def _belongs_to_a_layer(name: str, dtype: str, module: torch.nn.Module) -> bool:
    """Whether a tensor that is not used has numbers for a layer, or a list of layers, that the network has."""
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    if dtype in ("I64", "I32", "BOOL") or any(re.search(pattern, name) for pattern in ignored):
        return False
    return "." in name and name.split(".")[0] in dict(module.named_children())


class Changes(Protocol):
    """What is added to weights while they are loaded, see `wanlab.models.fusion`."""

    def __contains__(self, name: str) -> bool:
        """Whether a parameter is changed."""
        ...

    def fused(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The changed weight, rounded once to `dtype`."""
        ...


def fill(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    contents: Contents,
    *,
    device: torch.device,
    dtype: torch.dtype,
    changes: Changes | None = None,
) -> torch.nn.Module:
    """Read every tensor of a checkpoint into a skeleton, cast it and move it straight to the device.

    One tensor at a time: the host holds a single tensor, besides the kernel's cache of the file.

    Args:
        changes: what is added to weights before they are cast, such as LoRAs.

    Raises:
        WanlabError: a file became unreadable after it was checked, or a weight or a LoRA is NaN or infinite.
    """
    names = {source: name for name, source in contents.sources.items()}
    parameters = parameter_names(module)
    ends: dict[str, torch.Tensor] = {}
    with checkpoint.reader() as read:
        for source, value in _tensors(checkpoint, names):
            name = names[source]
            kind = stored_dtype(module, name, dtype) if parameters[name].is_floating_point() else value.dtype
            if name in contents.encodings:
                decode, shape = contents.encodings[name].decode, tuple(parameters[name].shape)
                moved = decode(lambda key: read(key).to(device), shape)
                moved = changes.fused(name, moved, kind) if changes and name in changes else moved.to(kind)
            elif changes and name in changes:
                moved = changes.fused(name, value.to(device), kind)
            # A GPU casts faster than the host, but would need room for both copies of a very large tensor.
            elif value.nbytes > _CAST_ON_HOST_BYTES:
                moved = value.to(kind).to(device)
            else:
                moved = value.to(device).to(kind)
            if moved.data_ptr() == value.data_ptr():
                moved = value.clone()  # else the weight would stay a view of the file
            if moved.is_floating_point() and moved.numel():
                ends[name] = torch.stack(torch.aminmax(moved))
            assign(module, name, moved.contiguous() if parameters[name].is_contiguous() else moved)
    _check_finite(ends, checkpoint, contents, dtype)
    return finish(module, device)


def _check_finite(
    ends: Mapping[str, torch.Tensor], checkpoint: Checkpoint, contents: Contents, dtype: torch.dtype
) -> None:
    """Refuse NaN and infinity, from the smallest and largest number of every tensor; waits once for the device."""
    if not ends or bool(torch.stack([pair.float() for pair in ends.values()]).isfinite().all()):
        return
    name = next(name for name in contents.sources if name in ends and not ends[name].isfinite().all())
    source = contents.sources[name]
    place = f"{checkpoint.where[source]}: tensor {checkpoint.in_file(source)}"
    with checkpoint.reader() as read:
        stored = read(source).float()
    if name not in contents.encodings and bool(stored.isfinite().all()):
        short = str(dtype).removeprefix("torch.")
        raise WanlabError(
            f'{place} has numbers beyond the range of {short}; load the model with dtype="bfloat16"'
        )
    raise WanlabError(f"{place} holds NaN or infinity; fetch the file again, or mend what wrote it")


def _tensors(checkpoint: Checkpoint, names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    sources = {checkpoint.in_file(source): source for source in names}
    for file in checkpoint.files:
        with open_file(file) as handle:
            for stored in handle.offset_keys():
                if stored in sources and checkpoint.where[sources[stored]] == file:
                    yield sources[stored], handle.get_tensor(stored)


def _sources(checkpoint: Checkpoint, module: torch.nn.Module) -> dict[str, str]:
    """Parameter name -> name in the files; a tied weight may be stored under either of its names, quanto's under its own."""
    aliases = {source: target for target, source in tied_names(module).items()}
    sources = {}
    for name in parameter_names(module):
        stored = next(
            (key for key in (name, aliases.get(name), f"{name}._data") if key in checkpoint.where), None
        )
        if stored is not None:
            sources[name] = stored
    return sources


def _variants(folder: Path) -> dict[str, Path]:
    """Variant -> its index, or its only file; the name is empty for files without a variant.

    diffusers and transformers write `<base>.<variant>.safetensors` and `<base>.safetensors.index.<variant>.json`.
    """
    found: dict[str, Path] = {}
    for base in _BASENAMES:
        index = re.compile(rf"{base}\.safetensors\.index(?:\.([\w-]+))?\.json")
        single = re.compile(rf"{base}(?:\.([\w-]+?))?\.safetensors")
        for pattern in (index, single):
            for path in sorted(folder.iterdir()):
                match = pattern.fullmatch(path.name)
                shard = match and re.search(r"-\d+-of-\d+$", match[1] or "")
                if match and not shard:
                    found.setdefault(match[1] or "", path)
    if found:
        return found
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        raise WanlabError(
            f"{folder / files[0]}: GGUF is not read; give the weights in safetensors (16 bits, FP8 with scales, or"
            " bitsandbytes)"
        )
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors")
    )
    if shards := [name for name in others if re.search(r"-\d+-of-\d+\.safetensors$", name)]:
        count = int(shards[0].removesuffix(".safetensors").rpartition("-")[2])
        raise WanlabError(
            f"{folder} has {len(shards)} of {count} shards and no index (.safetensors.index.json) that says what is in them;"
            " fetch the folder again"
        )
    if len(others) == 1 and others[0].endswith(".safetensors"):  # names and shapes of its tensors decide
        return {"": folder / others[0]}
    hint = f"; found only {', '.join(others[:3])}" if others else ""
    known = " or ".join(f"{base}.safetensors" for base in _BASENAMES)
    raise WanlabError(f"{folder} has no weights ({known}, or its .index.json){hint}")


def _files(folder: Path, path: Path) -> tuple[dict[str, str], list[Path]]:
    """Tensor -> name of its shard (empty without an index), and the files."""
    if path.suffix != ".json":
        return {}, [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WanlabError(f"{path} has no weight_map; fetch the file again")
    names = sorted(set(convert(weight_map, dict[str, str], f"{path}, weight_map").values()))
    absent = [name for name in names if not os.path.isfile(folder / name)]
    if absent:
        raise WanlabError(
            f"{folder / absent[0]} is missing ({len(names) - len(absent)} of {len(names)} shards"
            " are there); fetch it again"
        )
    return weight_map, [folder / name for name in names]


def open_file(file: Path) -> Any:
    """A safetensors file, of which single tensors can be read on the host.

    Raises:
        WanlabError: it is missing, truncated or of another kind.
    """
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        kind = file_kind(file)
        if not file.exists():
            raise WanlabError(f"{file} is {kind or 'missing'}; fetch it again") from error
        reason = f"it is {kind}" if kind else first_line(error)
        raise WanlabError(
            f"{file} is truncated or corrupt ({file.stat().st_size} bytes: {reason}); fetch it again"
        ) from error


CHUNK_BYTES, ALIGNMENT_BYTES = 1 << 30, 512
HOST_RESERVE_BYTES = 2 << 30
"""Host memory that stays free for other work beside a copy of an expert."""


@dataclass(frozen=True, eq=False)
class HostWeights:
    """A copy of a network's weights on the host, paired with the parameters that they belong to.

    Attributes:
        pairs: (parameter, its copy), one per parameter.
        lock_ms, fill_ms: time to allocate the memory, and time to copy the weights to it.
    """

    pairs: list[tuple[torch.nn.Parameter, torch.Tensor]]
    lock_ms: float
    fill_ms: float

    def refill(self) -> None:
        """Copy the weights back into the parameters, on the current stream; from pinned memory without waiting."""
        for parameter, copy in self.pairs:
            parameter.data.copy_(copy, non_blocking=True)


@contextmanager
def host_weights(module: torch.nn.Module, *, pinned: bool) -> Iterator[HostWeights]:
    """A copy of a network's weights on the host, page-locked if `pinned`; freed at the end of the block.

    Raises:
        WanlabError: the network has no weights of its own, or the memory cannot be allocated.
    """
    parameters = list(module.parameters())
    if not parameters:
        raise WanlabError(
            f"{type(module).__name__} has no weights of its own; an engine keeps them to itself"
        )
    places, sizes = _places([parameter.nbytes for parameter in parameters])
    begin = time.perf_counter()
    try:
        chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    except RuntimeError as error:
        raise WanlabError(
            f"host memory cannot be had ({first_line(error, 120)}); free some, or raise ulimit -l"
        ) from error
    locked = time.perf_counter()
    pairs = []
    for parameter, (chunk, start) in zip(parameters, places, strict=True):
        copy = chunks[chunk][start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        pairs.append((parameter, copy.copy_(parameter.data)))
    device = parameters[0].device
    synchronise(device)
    try:
        yield HostWeights(pairs, (locked - begin) * 1e3, (time.perf_counter() - locked) * 1e3)
    finally:
        synchronise(device)  # a copy may still be running
        pairs.clear()
        chunks.clear()
        del copy
        if pinned and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def _places(sizes: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Positions of arrays as (chunk, start), and the bytes of each chunk.

    The allocator of pinned memory rounds every request up to a power of two; full chunks of such a size waste little.
    """
    most = max([CHUNK_BYTES, *sizes])
    places, chunks = [], [0]
    for size in sizes:
        room = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if chunks[-1] and chunks[-1] + room > most:
            chunks.append(0)
        places.append((len(chunks) - 1, chunks[-1]))
        chunks[-1] += room
    return places, chunks


def check_host_room(name: str, size_bytes: int) -> None:
    """Refuse a copy of weights that the host cannot hold.

    Raises:
        WanlabError: too little is free; the message gives both figures.
    """
    free = free_bytes(torch.device("cpu"))
    if size_bytes + HOST_RESERVE_BYTES > free:
        raise WanlabError(
            f"{name}: a copy of one expert on the host needs {(size_bytes + HOST_RESERVE_BYTES) / GIB:.1f} GiB"
            f" with a reserve of {HOST_RESERVE_BYTES / GIB:.0f}, {free / GIB:.1f} GiB are free; stop other work or take a"
            " larger host"
        )
