"""The LoRAs that a model is asked for: files with a component and a strength, read as text without loading torch.

>>> model = models.load("wan2.2-i2v-a14b+high.safetensors@expert_high+low.safetensors@expert_low:0.8")
>>> model.notes   # what was fused into the weights, see `wanlab.models.fusion`

They stand in the name of the model, so that whatever takes a model takes them too: every notebook, command and sweep.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace

from wanlab.core.contents import content_digest
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, file_kind
from wanlab.core.paths import locate
from wanlab.models.spec import EXPERTS, Lora, ModelSpec

SUFFIX = ".safetensors"
FORM = "FILE[@COMPONENT][:STRENGTH]"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Names that PEFT gives to its files; the second has the scale of the first."""
_FORM = re.compile(r"(?P<file>.+?)(?:@(?P<component>\w+))?(?::(?P<strength>[^:@/\\]*))?", re.DOTALL)


def read_loras(lora: str | Sequence[str] | None) -> tuple[Lora, ...]:
    """LoRAs from text, `FILE[@COMPONENT][:STRENGTH]` each, such as `"low.safetensors@expert_low:0.8"`.

    Args:
        lora: one or several; several in one text are separated by `+`. The strength is 1 where none is given.

    Raises:
        WanlabError: another form, a strength that is no finite number, or a file that is missing or no safetensors file.
    """
    return tuple(map(_read, _split(lora) if isinstance(lora, str) else lora or ()))


def split_model(name: str) -> tuple[str, list[str]]:
    """The name of a model and the LoRAs that follow it: `"wan-nano+a.safetensors@expert_low"` -> `"wan-nano"` and the rest.

    A folder or file whose own name has a `+` is found.
    """
    if "+" not in name or os.path.exists(locate(name)):
        return name, []
    pieces = name.split("+")
    folders = (at for at in range(len(pieces) - 1, 1, -1) if os.path.isdir("+".join(pieces[:at]).strip()))
    at = next(folders, 1)
    return "+".join(pieces[:at]).strip(), _split("+".join(pieces[at:]))


def _split(text: str) -> list[str]:
    """The LoRAs of a text; a `+` before the end of a file's name belongs to the name."""
    found: list[str] = []
    for piece in text.split("+"):
        if found and SUFFIX not in found[-1]:
            found[-1] += f"+{piece}"
        else:
            found.append(piece)
    return [each.strip() for each in found if each.strip()]


def _read(text: str) -> Lora:
    match = _FORM.fullmatch(text)
    if os.path.isfile(text) or match is None:
        file, component, strength = text, "", None
    else:
        file, component, strength = match["file"], match["component"] or "", match["strength"]
    try:
        number = 1.0 if strength is None else float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WanlabError(f"lora {text!r}: the strength {strength!r} is no number; the form is {FORM}")
    path = locate(file).absolute()
    if not path.is_file():
        what = "a folder" if path.is_dir() else file_kind(path) or "missing"
        raise WanlabError(f"lora {text!r}: {path} is {what}; the form is {FORM}")
    if path.suffix != SUFFIX:
        raise WanlabError(f"lora {text!r}: {path.name} is not read; give a {SUFFIX} file")
    parts = [content_digest(path)]
    config = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_FILE and config.is_file():
        parts.append(content_digest(config))
    return Lora(str(path), component, number, parts[0][:12] if len(parts) == 1 else digest(parts, 12))


def with_lora(spec: ModelSpec, lora: str | Sequence[str] | None) -> ModelSpec:
    """The spec with these LoRAs in place of its own; without any as it is. See `read_loras` for their form.

    Raises:
        WanlabError: as `read_loras`; an unknown component, none where the model has two experts, or a LoRA that is named
            twice for one component.
    """
    experts = [name for name in spec.components if name in EXPERTS]
    found: list[Lora] = []
    for each in read_loras(lora):
        if not each.component and len(experts) != 1:
            name, has = os.path.basename(each.file), " and ".join(experts) or "no expert"
            raise WanlabError(
                f"{spec.name} has {has}; say which one {name} is for, such as"
                f" {name}@{(experts or spec.components)[0]}, or name it once for each"
            )
        each = replace(each, component=each.component or experts[0])
        spec.part_of(each.component)
        if any((each.digest, each.component) == (other.digest, other.component) for other in found):
            raise WanlabError(f"LoRA {each.file} is named twice for {each.component}; name it once")
        found.append(each)
    return replace(spec, loras=tuple(found)) if found else spec
