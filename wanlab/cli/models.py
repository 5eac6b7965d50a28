"""`wanlab models`: lists the models that wanlab knows by name."""

from __future__ import annotations

import argparse

from wanlab import models
from wanlab.cli.command import Command, print_table, show, video_size
from wanlab.core.errors import WanlabError

HELP = """List the models that wanlab knows by name, or show parameters, bytes and FLOPs of each component of one. A
model may also be a folder in the layout of diffusers or a hub id; a file wanlab.json in the folder states its default
settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the components of one model")
    parser.add_argument(
        "--size", metavar="HxWxF", help="count for a video of this height, width and number of frames"
    )


def main(options: argparse.Namespace) -> int:
    if options.name:
        spec = models.get(options.name)
        loras = "".join(f", LoRA {lora.identity} from {lora.file}" for lora in spec.loras)
        show(f"{spec.name}: {spec.pipeline_class}, weights from {spec.source}{loras}")
        show(models.facts(spec, **_size(options.size)).to_string(index=False))
        return 0
    print_table(
        ("model", "default size", "default", "experts", "components"), [_row(name) for name in models.names()]
    )
    show("wanlab models NAME shows parameters, bytes and FLOPs of each component")
    return 0


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    return dict(zip(("height", "width", "frames"), video_size(text), strict=True))


def _row(name: str) -> tuple[str, ...]:
    try:
        spec = models.get(name)
    except WanlabError as error:
        return (name, "", "", "", str(error))
    size = f"{spec.defaults.width}x{spec.defaults.height}x{spec.defaults.frames}"
    experts = "one expert" if spec.boundary_ratio is None else f"boundary {spec.boundary_ratio:g}"
    return (name, size, f"{spec.defaults.steps} steps", experts, ", ".join(spec.components))


COMMANDS = {"models": Command(HELP, add_arguments, main)}
