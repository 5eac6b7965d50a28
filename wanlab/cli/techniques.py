"""`wanlab techniques`: lists techniques, what each can buy on a model, and what this machine lacks for it."""

from __future__ import annotations

import argparse

import torch

from wanlab import models
from wanlab.cli.command import Command, add_size, print_table, safe, show, size_of
from wanlab.models.loading import resolve
from wanlab.techniques.switch_on import catalogue
from wanlab.techniques.technique import TIERS, setting_text

HELP = """List the techniques that a configuration can switch on: what each does, how exact it is, what it can buy at most
on a model if every operation took the same time, and what this machine or this model lacks for it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="wan-nano", help="registry name, local folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add_size(parser)


def main(options: argparse.Namespace) -> int:
    spec, device = models.get(options.model), resolve(options.device, "auto")[0]
    table = catalogue(spec, device, **size_of(options))
    show(f"{spec.name} on {_machine(device)}")
    print_table(
        ("technique", "tier", "at most", "settings"),
        [
            (row.technique, row.tier, f"{row.at_most_times_faster:.2f}x", _settings(row.settings))
            for row in table.itertuples()
        ],
    )
    for row in table.itertuples():
        show(f"\n{row.technique}: {row.does}")
        show(f"  at most {row.at_most_times_faster:.2f}x, because {row.bound}")
        if row.not_with:
            show(f"  not together with {', '.join(row.not_with)}")
        here = "  it can run here"
        if row.simulated:
            here += f", simulated: the same quality and no time saved; that needs {safe(row.simulated, None)}"
        show(f"  it cannot run here: it needs {safe(row.lacks, None)}" if row.lacks else here)
    show("", *(f"{tier}: {meaning}" for tier, meaning in TIERS.items()))
    return 0


def _settings(settings: dict) -> str:
    return ", ".join(f"{name} {setting_text(value)}" for name, value in settings.items())


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


COMMANDS = {"techniques": Command(HELP, add_arguments, main)}
