"""`wanlab config`: lists configurations, shows one, and explains one on a model."""

from __future__ import annotations

import argparse

from wanlab.cli.command import Command, add_size, safe, show, size_of
from wanlab.configuration.configuration import Configuration, configurations, load_configuration

HELP = "List configurations, show one, or explain what it does on a model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the configurations that come with wanlab")
    show = actions.add_parser("show", help="a configuration as canonical YAML, with its hash")
    explain = actions.add_parser(
        "explain", help="engines, files, formats and checks on a model, without its weights"
    )
    for each in (show, explain):
        each.add_argument("name", metavar="NAME", help="YAML file, or a name of `wanlab config list`")
    explain.add_argument(
        "--model", default="wan-nano", help="registry name or local folder (default: %(default)s)"
    )
    explain.add_argument(
        "--engines",
        default="outputs/configured",
        metavar="DIR",
        help="folder of converted networks (default: %(default)s)",
    )
    explain.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add_size(explain)


def main(options: argparse.Namespace) -> int:
    if options.action == "list":
        known = configurations()
        width = max(map(len, known), default=0)
        for name, configuration in known.items():
            show(f"{name:{width}}  {safe(configuration.about, None)}")
        return 0
    configuration = load_configuration(options.name)
    if options.action == "show":
        show(f"# hash: {configuration.hash}\n{configuration.to_yaml()}", end="")
        return 0
    return _explain(configuration, options)


def _explain(configuration: Configuration, options: argparse.Namespace) -> int:
    from wanlab.configuration.explain import explain  # loads torch

    explanation = explain(
        configuration, options.model, options.engines, device=options.device, **size_of(options)
    )
    clip = "{height}x{width}x{frames}".format(**explanation.size)
    show(f"{configuration.name} ({configuration.hash[:12]}) on {explanation.model}, {clip} pixels")
    if configuration.about:
        show(safe(configuration.about, None))
    show("\nengines")
    rows = [
        (
            row.component,
            row.title + (f", plan {configuration.plan_name} {row.plan}" if row.plan else ""),
            row.file,
        )
        for row in explanation.components.itertuples()
    ]
    width = max(len(engine) for _, engine, _ in rows)
    for component, engine, file in rows:
        show(f"  {component:13} {engine:{width}}  {file}".rstrip())
    if explanation.formats is not None:
        show(f"\nformats by plan {configuration.plan_name}")
        for row in explanation.formats.itertuples():
            show(
                f"  {row.component:13} {row.format:12} {row.layers:6,} layers {row.size_bytes / 2**20:10,.1f} MiB"
                f" {row.weights_percent:6.1f} % of weights {row.flop_percent:6.1f} % of operations"
            )
    if len(explanation.techniques):
        show("\ntechniques, in the order in which they are applied")
        for row in explanation.techniques.itertuples():
            show(
                f"  {row.technique:17} {row.tier}; {row.bound}", f"  {'':17} here because {row.order_reason}"
            )
    show("\nthis machine lacks")
    for line in explanation.missing or ("nothing",):
        show(f"  {line}")
    show("\nchecked when it is opened")
    for line in explanation.checks:
        show(f"  {line}")
    return 0


COMMANDS = {"config": Command(HELP, add_arguments, main)}
