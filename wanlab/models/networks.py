"""Networks without weights: the true architecture on torch's meta device, to be filled later.

Parameters take no memory here; buffers that are computed and not stored (rotary frequencies) are real.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from typing import Any

import torch
from accelerate import init_empty_weights

from wanlab.core.errors import WanlabError, first_line
from wanlab.models.spec import Part

RANDOM_STD = 0.02


def network_class(part: Part) -> type:
    """The class of a part from diffusers or transformers.

    Raises:
        WanlabError: the library is unknown or has no such class.
    """
    library = part.library
    if library not in ("diffusers", "transformers"):
        # model_index.json may also name a package of diffusers.pipelines, such as "ltx2".
        library = f"diffusers.pipelines.{part.library}"
        if not part.library.isidentifier() or importlib.util.find_spec(library) is None:
            raise WanlabError(
                f"{part.name}: {part.class_name} comes from {part.library!r}; wanlab loads networks of diffusers"
                " and transformers"
            )
    cls = getattr(importlib.import_module(library), part.class_name, None)
    if not isinstance(cls, type):
        raise WanlabError(
            f"{part.name}: the installed {part.library} has no {part.class_name}; update it:"
            f" pip install -U {part.library}"
        )
    return cls


def skeleton(part: Part, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A part with parameters on the meta device and computed buffers on the CPU, in evaluation mode.

    Args:
        part: the network to build.
        dtype: default dtype during construction, as `from_pretrained` sets it.

    Raises:
        WanlabError: unknown class, or a configuration that the class does not accept.
    """
    cls: Any = network_class(part)
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            # Weights are dequantized, so the network is that of a model that was never quantized.
            config = {key: value for key, value in part.config.items() if key != "quantization_config"}
            if part.library != "transformers":
                module = cls.from_config(config)
            else:
                config = {key: value for key, value in config.items() if not key.startswith("_")}
                module = cls(cls.config_class.from_dict(config))
                module.config.dtype = dtype or before
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise WanlabError(
            f"{part.name}: {part.class_name} refuses its config.json ({first_line(error)})"
        ) from error
    finally:
        torch.set_default_dtype(before)
    return module.eval()


def tied_names(module: torch.nn.Module) -> dict[str, str]:
    """Parameters that share storage with another: name -> name of the original (UMT5: the token embedding).

    A class may tie some that a configuration keeps apart (`lm_head` of LLaVA); transformers lists those really tied.
    """
    tied = getattr(module, "all_tied_weights_keys", getattr(module, "_tied_weights_keys", None))
    return dict(tied) if isinstance(tied, dict) else {}


def parameter_names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Stored tensors by name, parameters and persistent buffers; a tied one is listed once."""
    tied = tied_names(module)
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in tied}


def stored_dtype(module: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a floating-point tensor of a network that is loaded in `dtype`.

    Follows both libraries: diffusers always keeps the modules in `_keep_in_fp32_modules` in float32,
    transformers keeps them for float16 only, and those in `_keep_in_fp32_modules_strict` for both.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype if not _kept(module, "_keep_in_fp32_modules", name) else torch.float32
    keep = _kept(module, "_keep_in_fp32_modules_strict", name)
    if dtype is torch.float16 or not _is_transformers(module):
        keep = keep or _kept(module, "_keep_in_fp32_modules", name)
    return torch.float32 if keep else dtype


def needed_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a network's weights and buffers once it is loaded in `dtype`."""
    total = 0
    stored = parameter_names(module)
    for name, tensor in stored.items():
        kind = stored_dtype(module, name, dtype) if tensor.is_floating_point() else tensor.dtype
        total += tensor.numel() * kind.itemsize
    total += sum(buffer.nbytes for name, buffer in module.named_buffers() if name not in stored)
    return total


def assign(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` by a tensor; parameters get no gradients."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def finish(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Tie shared parameters and move the computed buffers to the device."""
    for target, source in tied_names(module).items():
        path, _, leaf = target.rpartition(".")
        owner_path, _, owner_leaf = source.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = module.get_submodule(owner_path)._parameters[
            owner_leaf
        ]
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)
    return module


def fill_random(
    module: torch.nn.Module, *, name: str, device: torch.device, dtype: torch.dtype, seed: int
) -> torch.nn.Module:
    """Fill a network with random weights, drawn on the device without a copy on the host.

    Normal with deviation min(0.02, 1/sqrt(fan in)), so that no layer amplifies; norm scales are 1 and
    biases 0; modulation tables as Wan initialises them, 1/sqrt(width). The values depend on the seed, the
    part's name and the device type.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    for key, like in parameter_names(module).items():
        if not like.is_floating_point() or not isinstance(like, torch.nn.Parameter):
            continue  # buffers are computed: statistics of latents, for one, must not be noise
        value = torch.empty(like.shape, dtype=stored_dtype(module, key, dtype), device=device)
        owner, _, leaf = key.rpartition(".")
        norm = "norm" in type(module.get_submodule(owner)).__name__.lower()
        if leaf == "bias":
            value.zero_()
        elif leaf == "gamma" or norm:
            value.fill_(1.0)
        elif leaf == "scale_shift_table":
            value.normal_(0.0, 1 / math.sqrt(value.shape[-1]), generator=generator)
        else:
            fan_in = math.prod(value.shape[1:]) or 1
            value.normal_(0.0, min(RANDOM_STD, 1 / math.sqrt(fan_in)), generator=generator)
        assign(module, key, value)
    return finish(module, device)


def _kept(module: torch.nn.Module, attribute: str, name: str) -> bool:
    pieces = name.split(".")
    return any(kept in pieces for kept in getattr(module, attribute, None) or ())


def _is_transformers(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")
