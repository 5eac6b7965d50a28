"""Weights in safetensors files: find them, check them before memory is spent, read them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.models.networks import assign, finish, parameter_names, stored_dtype, tied_names
from wanlab.models.registry import read_json

if TYPE_CHECKING:
    import torch

_CAST_ON_HOST_BYTES = 2**29
_BASENAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one part: which tensor lies in which file."""

    folder: Path
    files: tuple[Path, ...]
    where: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    size_bytes: int


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find and check the weight files of one part, reading headers only.

    Takes one file, or shards named by an index. A file must be as long as its header says.

    Raises:
        WanlabError: no weights, a missing shard, a truncated or corrupt file, or an index that promises
            what is not there.
    """
    if not folder.is_dir():
        raise WanlabError(f"{folder} is missing; the model is incomplete, fetch it again")
    index, files = _files(folder)
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118, the handle is no mapping
                where[name] = file
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    for name, file in index.items():
        if where.get(name) != folder / file:
            raise WanlabError(
                f"{folder / file} lacks tensor {name} that the index promises; fetch the file again"
            )
    return Checkpoint(folder, tuple(files), where, shapes, sum(file.stat().st_size for file in files))


def check(checkpoint: Checkpoint, module: torch.nn.Module) -> tuple[str, ...]:
    """Compare a checkpoint with the network it is for, before anything is allocated.

    Returns:
        Names of tensors in the files that the network does not use.

    Raises:
        WanlabError: a tensor is missing or has another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in parameter_names(module).items()}
    tied = tied_names(module)
    sources = _sources(checkpoint, module)
    missing = [name for name in wanted if name not in sources]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WanlabError(
            f"{checkpoint.folder} lacks tensor {missing[0]}{more} of {type(module).__name__};"
            " is it another model's? Else fetch it again"
        )
    for name, shape in wanted.items():
        found = checkpoint.shapes[sources[name]]
        if found != shape:
            raise WanlabError(
                f"{checkpoint.where[sources[name]]}: tensor {sources[name]} has shape {list(found)},"
                f" config.json asks for {list(shape)}; weights and config.json belong to two models"
            )
    return tuple(sorted(set(checkpoint.where) - set(sources.values()) - set(tied)))


def fill(
    module: torch.nn.Module, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """Read every tensor of a checkpoint into a skeleton, cast, straight to the device.

    One tensor at a time: the host holds a single tensor besides what the kernel caches of the file.

    Raises:
        WanlabError: a file became unreadable since it was checked.
    """
    names = {source: name for name, source in _sources(checkpoint, module).items()}
    wanted = parameter_names(module)
    for source, value in _tensors(checkpoint, names):
        name = names[source]
        kind = stored_dtype(module, name, dtype) if value.is_floating_point() else value.dtype
        # A GPU casts faster than the host, but would need room for both copies of a very large tensor.
        moved = value.to(kind).to(device) if value.nbytes > _CAST_ON_HOST_BYTES else value.to(device).to(kind)
        if moved.data_ptr() == value.data_ptr():
            moved = value.clone()  # else the weight would stay a view of the file
        assign(module, name, moved.contiguous() if wanted[name].is_contiguous() else moved)
    return finish(module, device)


def _tensors(checkpoint: Checkpoint, names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in checkpoint.files:
        with _opened(file) as handle:
            for source in handle.offset_keys():
                if source in names and checkpoint.where[source] == file:
                    yield source, handle.get_tensor(source)


def _sources(checkpoint: Checkpoint, module: torch.nn.Module) -> dict[str, str]:
    """Parameter name -> name in the files; a tied weight may be stored under either of its names."""
    aliases = {source: target for target, source in tied_names(module).items()}
    sources = {}
    for name in parameter_names(module):
        found = next((key for key in (name, aliases.get(name)) if key in checkpoint.where), None)
        if found is not None:
            sources[name] = found
    return sources


def _files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    for base in _BASENAMES:
        index = folder / f"{base}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise WanlabError(f"{index} has no weight_map; fetch the file again")
            names = sorted({str(name) for name in weight_map.values()})
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise WanlabError(
                    f"{folder / absent[0]} is missing ({len(names) - len(absent)} of {len(names)} shards"
                    " are there); fetch it again"
                )
            return weight_map, [folder / name for name in names]
        if (folder / base).is_file():
            return {}, [folder / base]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors"))
    hint = f"; found only {', '.join(others[:3])}" if others else ""
    raise WanlabError(f"{folder} has no weights ({' or '.join(_BASENAMES)}, or its .index.json){hint}")


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WanlabError(
            f"{file} is truncated or corrupt ({file.stat().st_size if file.exists() else 0} bytes: {reason});"
            " fetch it again"
        ) from error
