"""Inputs of components recorded from real generations, as files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from msgspec import structs
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from wanlab import heldout
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import atomic_path
from wanlab.core.manifest import Manifest
from wanlab.core.paths import locate
from wanlab.core.pictures import read_picture
from wanlab.core.text import read_text
from wanlab.export.components import check_components, component_spec, default_shape
from wanlab.heldout import clips
from wanlab.heldout.cases import Case, draw_cases, has_texture, is_held_out, picture
from wanlab.measure.stages import stages
from wanlab.models.shapes import latent_shape
from wanlab.models.spec import EXPERTS
from wanlab.models.taps import component_calls, intercept_calls
from wanlab.precision.denoiser import (
    drawn_arguments,
    eager_network,
    named_arguments,
    put_together,
    taken_apart,
)


@dataclass(frozen=True, eq=False)
class Example:
    """Arguments of one generation, as `Model.generate` takes them.

    Attributes:
        name: its name in tables.
        conditions: further inputs of the model, by name.
        adapts: whether a model of another task may leave its picture out, and have the frames of a held-out clip for
            further inputs that it needs; so of examples that are made of cases.
    """

    image: Image.Image | str | os.PathLike | np.ndarray | None
    prompt: str
    seed: int = 0
    negative_prompt: str = ""
    name: str = ""
    conditions: Mapping[str, Any] | None = None
    adapts: bool = False

    def inputs(self, model, frames: int | None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`image` and `conditions` of `Model.generate` for a model.

        Args:
            model: the model. frames: frames of the video; the model's default if None.
            given: conditions where the example has none of its own.
        """
        needed = dict(model.conditions)
        pictured = needed.pop("image", None) is not None
        conditions = self.conditions or given
        if conditions is None and needed and self.adapts:
            conditions = heldout.inputs(needed, frames or model.spec.defaults.frames)["conditions"]
        image = None if self.adapts and not pictured else self.image
        return {"image": image} | ({"conditions": dict(conditions)} if conditions else {})


def nano_examples(count: int = 4, *, seed: int = 7) -> list[Example]:
    """Cases like those that wan-nano was trained on, with photographs that it was trained on: none is held out.

    They take motions and photographs in turn, with a moving object in every other round, as
    `wanlab.heldout.cases.draw_cases` does; photographs with too little texture to show motion are left out.
    """
    photographs = [name for name in clips.TRAINING_PHOTOGRAPHS if has_texture(picture(name))]
    return as_examples(draw_cases(count, seed=seed, photographs=photographs))


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def load_examples(folder: str | os.PathLike) -> list[Example]:
    """Examples from a folder of images, each with its prompt in a text file of the same name (`cat.png`, `cat.txt`).

    They come in the order of their names; each has its position as its seed.

    Raises:
        WanlabError: no such folder, no image in it, an image that cannot be read, two images of one name, or an image
            whose prompt is missing or cannot be read.
    """
    folder = locate(folder)
    if not folder.is_dir():
        raise WanlabError(
            f"no folder at {folder}; give one with images and, beside each, its prompt as a text file"
        )
    # A name with a dot before it is another program's: "._cat.png" holds what a Mac keeps beside cat.png.
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGES]
    if not images:
        raise WanlabError(
            f"{folder} holds no image ({', '.join(IMAGES)}); put some in, each with its prompt beside it"
        )
    examples: list[Example] = []
    for index, path in enumerate(images):
        if examples and path.stem == examples[-1].name:
            raise WanlabError(
                f"{examples[-1].image} and {path} would share the prompt {path.stem}.txt; rename one of them"
            )
        file = path.with_suffix(".txt")
        if not file.is_file():
            raise WanlabError(f"{path} has no prompt that can be read; write it into {file} as text")
        prompt = " ".join(read_text(file).split())
        examples.append(_readable(Example(path, prompt, seed=index, name=path.stem)))
    return examples


def _readable(example: Example) -> Example:
    """The example, once its picture was decoded: a damaged one must not be met after an hour of calibration."""
    if isinstance(example.image, str | os.PathLike):
        read_picture(example.image)
    return example


def as_examples(given: str | os.PathLike | Iterable[Any]) -> list[Example]:
    """Examples from examples, `wanlab.heldout.cases.Case`s, (image, prompt) pairs, or a folder as `load_examples` reads it.

    Raises:
        WanlabError: another type, no example, or a photograph that is held out to judge quality; as `load_examples`.
    """
    if isinstance(given, str | os.PathLike):
        return load_examples(given)
    examples = []
    for index, case in enumerate(given):
        if isinstance(case, Case):
            if is_held_out(case.photograph):
                raise WanlabError(
                    f"{case.photograph} is held out to judge quality, so nothing may be calibrated on it; take"
                    " wanlab.precision.nano_examples"
                )
            first = case.truth()[0]
            name = f"{case.photograph} {case.clip.motion}"
            case = Example(first, case.caption, case.seed, name=name, adapts=True)
        elif isinstance(case, tuple | list) and len(case) == 2:
            case = Example(case[0], case[1], seed=index)
        if not isinstance(case, Example):
            raise WanlabError(f"example {index} is {type(case).__name__}; give Example or (image, prompt)")
        examples.append(_readable(case))
    if not examples:
        raise WanlabError("no example to record; give at least one Example or (image, prompt)")
    return examples


def keep(folder: Path, tensor: torch.Tensor) -> str:
    """Write a tensor under the hash of its content, once."""
    # A clone, as `contiguous` keeps the strides of a broadcast axis of size 1.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    content = _digest(tensor)
    path = tensor_file(folder, content)
    if not path.exists():
        with atomic_path(path, ".safetensors") as draft:
            save_file({"tensor": tensor}, draft)
    return content


def _digest(tensor: torch.Tensor) -> str:
    """Hash of dtype, shape and every byte of a contiguous tensor on the CPU."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read(folder: Path, content: str) -> torch.Tensor:
    """The tensor of this content, on the CPU.

    Raises:
        WanlabError: its file is missing or broken.
    """
    try:
        tensor = load_file(tensor_file(folder, content))["tensor"]
        if _digest(tensor) != content:
            raise ValueError("its content was changed")
        return tensor
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WanlabError(
            f"{tensor_file(folder, content)} of the recording is missing or broken ({reason}); record it again"
        ) from error


def tensor_file(folder: Path, content: str) -> Path:
    """Path of the tensor with this content."""
    return folder / f"{content[:32]}.safetensors"


MANIFEST = "recording.json"


@dataclass(frozen=True)
class RecordedCall:
    """One call of one component.

    Attributes:
        example: index of the example, from 0.
        component: wanlab's name of it.
        step, timestep, sigma: denoising step from 0, timestep from 0 to 1000, and sigma; None outside the experts.
        branch: `"cond"` or `"uncond"`; None outside the experts.
        tensors: name of the input -> hash of its content, which names its file.
        others: further arguments of an expert's call, numbers and texts, by name.
    """

    example: int
    component: str
    step: int | None
    timestep: float | None
    sigma: float | None
    branch: str | None
    tensors: dict[str, str]
    others: dict[str, Any] = field(default_factory=dict)


class Recording(Manifest, frozen=True, kw_only=True):
    """Inputs of components, one file per distinct tensor.

    Attributes:
        path: path of the folder of the files and this record.
        model: registry name or folder of the model that they were recorded with.
        settings: settings of the generations, and the examples' names, prompts and seeds.
        calls: calls in their order.
    """

    KIND: ClassVar[str] = "recording"
    FORMAT: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "record it again"
    NONE: ClassVar[str] = "no recording in {path}; make it with wanlab.precision.record_inputs"

    model: str
    settings: dict[str, Any]
    calls: tuple[RecordedCall, ...]

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """Path of the record in a folder."""
        return Path(path) / MANIFEST

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.component for call in self.calls))

    def of(self, component: str) -> tuple[RecordedCall, ...]:
        """The calls of one component.

        Raises:
            WanlabError: none was recorded.
        """
        if component not in self.components:
            raise WanlabError(
                f"nothing of {component!r} is recorded in {self.folder}{did_you_mean(component, self.components)};"
                f" there is {', '.join(self.components)}"
            )
        return tuple(call for call in self.calls if call.component == component)

    def inputs_key(self, component: str) -> str:
        """Hash of all inputs of one component, in order."""
        facts = [
            [call.step, call.branch, call.timestep, call.tensors, *([call.others] if call.others else [])]
            for call in self.of(component)
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def inputs(self, call: RecordedCall) -> dict[str, torch.Tensor]:
        """The tensors of a call, on the CPU, in their dtypes.

        Raises:
            WanlabError: a file is missing or broken.
        """
        return {name: read(self.folder, content) for name, content in call.tensors.items()}

    def arguments(self, call: RecordedCall, network: torch.nn.Module) -> dict[str, Any]:
        """The arguments of an expert's call, on the network's device.

        Raises:
            WanlabError: as `inputs`.
        """
        return put_together(network, self.inputs(call), call.others)

    def cases(self) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """Component -> a label of the call, such as "step 3 cond" -> its tensors, as `engines.parity_all` takes them."""
        return {
            name: {f"step {call.step} {call.branch}": self.inputs(call) for call in self.of(name)}
            for name in self.components
        }

    def frame(self) -> pd.DataFrame:
        """One row per call: example, component, step, timestep, sigma, branch."""
        hidden = ("tensors", "others")
        rows = [{k: v for k, v in asdict(call).items() if k not in hidden} for call in self.calls]
        return pd.DataFrame(rows).astype({"step": "Int64", "timestep": "Float64", "sigma": "Float64"})

    @property
    def size_bytes(self) -> int:
        """Size of the tensors on disk."""
        files = {content for call in self.calls for content in call.tensors.values()}
        return sum(tensor_file(self.folder, content).stat().st_size for content in files)

    def only(self, **values: Any) -> Recording:
        """The calls whose fields have these values, e.g. `only(branch="cond", step=[0, 1])`."""
        for name in values:
            if name not in RecordedCall.__dataclass_fields__:
                raise WanlabError(
                    f"a call has no {name!r}{did_you_mean(name, RecordedCall.__dataclass_fields__)}"
                )
        calls = tuple(c for c in self.calls if all(_is(getattr(c, k), v) for k, v in values.items()))
        return structs.replace(self, calls=calls)


def inputs_of(
    model, count: int, folder: str | os.PathLike, *, recorded: bool = False, **settings: Any
) -> Recording:
    """Inputs on `count` of wan-nano's examples: recorded in a folder, or with `recorded` read from it.

    Raises:
        WanlabError: as `read_recording` or `record_inputs`.
    """
    if recorded:
        return read_recording(folder)
    return record_inputs(model, nano_examples(count), folder, **settings)


def record_inputs(
    model,
    cases: str | os.PathLike | Sequence,
    folder: str | os.PathLike,
    *,
    components: Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Recording:
    """Generate, and record the inputs of components.

    Every step and both branches of guidance are recorded. Tensors are written at once, each content only once, so that no
    more memory is needed than for a generation.

    Args:
        model: model from `wanlab.models.load`.
        cases: `Example`s, (image, prompt) pairs, a folder as `load_examples` reads it, or cases of `wanlab.heldout.cases`
            whose photograph is not held out.
        folder: folder of the recording; it is made, and must be empty or hold an older recording, which is replaced.
        components: components to record; None takes the experts.
        progress: whether a bar over the examples is shown.
        settings: settings of `Model.generate`: steps, height, width, frames, guidance_scale; conditions for examples that
            have none of their own.

    Raises:
        WanlabError: no case, a held-out photograph, an unknown component, or a folder with other files in it.
    """
    examples = as_examples(cases)
    chosen = _chosen_components(model, components)
    output = settings.pop("output", "np" if "vae_decoder" in chosen else "latent")
    folder = _empty(Path(folder))
    settings.pop("image", None)  # of a notebook's `ask`: each example has its own
    conditions = settings.pop("conditions", None)
    names = {
        component: None if component in EXPERTS else tuple(component_spec(model, component).inputs)
        for component in chosen
    }
    calls: list[RecordedCall] = []
    generation, sizes_sq = None, []
    bar = tqdm(examples, desc="record inputs", unit="generation", leave=False, disable=not progress)
    for index, example in enumerate(bar):
        with _recording_calls(model, names, folder, index, calls):
            generation = model.generate(
                prompt=example.prompt,
                negative_prompt=example.negative_prompt,
                seed=example.seed,
                output=output,
                **example.inputs(model, settings.get("frames"), conditions),
                **settings,
            )
        if output == "latent":
            sizes_sq.append(float((generation.video.astype(np.float64) ** 2).sum()))
    kept = {
        key: value for key, value in generation.settings.items() if key not in ("prompt", "negative_prompt")
    }
    kept["examples"] = [[example.name, example.prompt, example.seed] for example in examples]
    if sizes_sq:
        kept["latents_sq"] = sizes_sq
    size = {name: kept[name] for name in ("height", "width", "frames")}
    sigmas = {
        step: sigma if math.isfinite(sigma) else None
        for step, sigma in enumerate(model.schedule(kept["steps"], **size)["sigma"].tolist())
    }
    calls = [replace(call, sigma=sigmas.get(call.step)) for call in calls]
    recording = Recording(path=str(folder), model=model.spec.name, settings=kept, calls=tuple(calls))
    recording.write()
    return recording


def read_recording(folder: str | os.PathLike) -> Recording:
    """A recording from its folder.

    Raises:
        WanlabError: there is none, or it cannot be read.
    """
    return Recording.read(folder)


def random_recording(
    model,
    component: str,
    folder: str | os.PathLike,
    *,
    steps: int = 8,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    seed: int = 0,
) -> Recording:
    """Random inputs of one expert in the steps of a generation in which it runs, as a recording.

    For random weights, whose generations mean nothing: a sensitivity on them only compares layers with one another.

    Args:
        component: expert; the others need not be loaded.
        folder: folder of this recording alone; it is made.
        steps: number of steps of the generation. height, width, frames: size of the clip; None takes the model's default.
        seed: seed of the inputs; each step has inputs of its own.

    Raises:
        WanlabError: the expert runs in none of these steps, or it is not known what it is called with.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = default_shape(model, batch=1, height=height, width=width, frames=frames)
    latent = latent_shape(model.spec, shape.height, shape.width, shape.frames)
    schedule = model.schedule(steps)
    calls = []
    for row in schedule[schedule["component"] == component].itertuples():
        inputs, values = taken_apart(drawn_arguments(model, component, latent, seed=seed + int(row.step)))
        if not inputs:
            raise WanlabError(
                f"it is not known what {component} of {model.spec.name} is called with (CONTRIBUTING.md); record one"
            )
        inputs["timestep"] = torch.full_like(inputs["timestep"], row.timestep)
        tensors = {name: keep(folder, tensor) for name, tensor in inputs.items()}
        step, timestep, sigma = int(row.step), float(row.timestep), float(row.sigma)
        calls.append(RecordedCall(0, component, step, timestep, sigma, "cond", tensors, values))
    if not calls:
        raise WanlabError(f"{component} runs in none of {steps} steps; give more steps")
    sizes = {"height": shape.height, "width": shape.width, "frames": shape.frames}
    settings = sizes | {"steps": steps, "guidance_scale": 1.0}
    return Recording(path=str(folder), model=model.spec.name, settings=settings, calls=tuple(calls))


def _chosen_components(model, components: Sequence[str] | None) -> tuple[str, ...]:
    if components is None:
        return tuple(name for name in model.components if name in EXPERTS)
    components = (components,) if isinstance(components, str) else tuple(components)
    check_components(
        model, [name for name in components if name not in EXPERTS or name not in model.components]
    )
    return components


def _empty(folder: Path) -> Path:
    """The folder, emptied of an older recording; other files are an error."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    if files and not (folder / MANIFEST).is_file() and any(p.suffix != ".safetensors" for p in files):
        raise WanlabError(f"{folder} holds other files; give a folder for the recording alone")
    for path in files:
        if path.suffix == ".safetensors" or path.name.lstrip(".").startswith(MANIFEST):
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _recording_calls(
    model, names: dict[str, tuple[str, ...] | None], folder: Path, example: int, calls: list[RecordedCall]
) -> Iterator[None]:
    """Inside the block every call of the named components is recorded; of an expert every argument, whatever it takes."""
    with stages(model) as stage:

        def recorder(component: str):
            def wrap(call):
                def record(*args, **kwargs):
                    known = names[component]
                    values: dict[str, Any] = {}
                    if known is None:
                        network = eager_network(model, component)
                        given, values = taken_apart(named_arguments(network, args, kwargs))
                    else:
                        bound = dict(zip(known, args, strict=False)) | kwargs
                        given = {name: bound[name] for name in known}
                    tensors = {name: keep(folder, tensor) for name, tensor in given.items()}
                    result = call(*args, **kwargs)
                    at = stage.calls[-1]
                    recorded = RecordedCall(
                        example, component, at.step, at.timestep, None, at.branch, tensors, values
                    )
                    calls.append(recorded)
                    return result

                return record

            return wrap

        points = {
            attribute: {method: recorder(name) for method, name in methods.items() if name in names}
            for attribute, methods in component_calls(model.pipeline).items()
        }
        with intercept_calls(model.pipeline, {key: methods for key, methods in points.items() if methods}):
            yield


def _is(value: Any, values: Any) -> bool:
    return value in values if isinstance(values, list | tuple | set | range) else value == values
