"""`wanlab plan`: lists precision plans, shows the formats of a model by one, and explains the format of a layer."""

from __future__ import annotations

import argparse

from wanlab import models
from wanlab.cli.command import Command, show
from wanlab.models.shapes import latent_shape
from wanlab.precision.assignment import Assignment, assign_architecture
from wanlab.precision.plan import PRESETS

HELP = """List the precision plans that come with wanlab, show which formats one gives the layers of a model, or
explain why a layer has its format. No weight is read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the plans that come with wanlab")
    show = actions.add_parser("show", help="weights and operations by format on a model, without its weights")
    explain = actions.add_parser("explain", help="why a layer has its format")
    for each in (show, explain):
        each.add_argument("plan", help="YAML file, or a plan of `wanlab plan list`")
        each.add_argument(
            "--model", default="wan-nano", help="registry name or local folder (default: wan-nano)"
        )
        each.add_argument(
            "--default",
            choices=("fp32", "fp16", "bf16"),
            help="dtype of the networks, where the plan leaves it open",
        )
    explain.add_argument(
        "layer", help="name of a layer, e.g. blocks.7.ffn.net.2 or transformer_blocks.7.ff.net.2"
    )
    explain.add_argument("--component", help="expert, expert_high or expert_low (default: all)")
    explain.add_argument("--step", type=int, help="step of the generation, from 0")


def main(options: argparse.Namespace) -> int:
    if options.action == "list":
        width = max(map(len, PRESETS))
        for plan in PRESETS.values():
            show(f"{plan.name:{width}}  {plan.note}")
        return 0
    assignment = assign_architecture(options.plan, options.model, options.default)
    if options.action == "explain":
        chosen = [options.component] if options.component else list(assignment.components)
        for component in chosen:
            show(assignment.explain(component, options.layer, options.step))
        return 0
    show(
        f"{assignment.plan.name} ({assignment.plan.hash[:12]}) on {options.model}, networks in {assignment.default}"
    )
    for index, rule in enumerate(assignment.plan.rules):
        show(f"  {index}: {rule}" + (f"  # {rule.note}" if rule.note else ""))
    for line in assignment.without_effect():
        show(f"  {line}")
    show(_text(assignment, options.model))
    return 0


def _text(assignment: Assignment, model: str) -> str:
    spec = models.get(model)
    usual = spec.defaults
    tokens = latent_shape(spec, usual.height, usual.width, usual.frames).tokens
    table = assignment.cost(tokens, usual.text_tokens)
    rows = [
        f"  {row.component:12} {row.format:12} {row.layers:6,} layers {row.size_bytes / 2**20:10,.1f} MiB"
        f" {row.bits_per_weight:6.2f} bits a weight {row.weights_percent:6.1f} % of weights"
        f" {row.flop_percent:6.1f} % of their operations"
        for row in table.itertuples()
    ]
    share = f"{100 * assignment.share(8):.1f} % of linear weights at 8 bits or fewer"
    return "\n".join(
        [*rows, f"{share}; {usual.height}x{usual.width}x{usual.frames} pixels, {tokens:,} tokens"]
    )


COMMANDS = {"plan": Command(HELP, add_arguments, main)}
