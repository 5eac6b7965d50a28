"""`wanlab evaluate`: scores one video file against another."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab import evaluate
from wanlab.cli.command import Command, show
from wanlab.evaluate.catalogue import ALL_METRICS

HELP = "Score an optimised video against the original, frame by frame, and write the scores as JSON."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--original", required=True, metavar="VIDEO", help="video of the original model")
    parser.add_argument("--optimized", required=True, metavar="VIDEO", help="video of the optimised model")
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help=f"{', '.join(ALL_METRICS)} or all; may be given more than once (default: lpips)",
    )
    parser.add_argument(
        "--backbone",
        default="auto",
        metavar="NAME",
        help="LPIPS network: stlpips-alex (auto; works offline), lpips-alex, lpips-vgg, lpips-squeeze",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="where to write the scores (default: <optimized>.scores.json in the current folder)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def main(args: argparse.Namespace) -> int:
    """Print a table of scores and write them as JSON; returns the exit status 0.

    Raises:
        WanlabError: an error of `compare_videos`.
    """
    scores = evaluate.compare_videos(
        args.original,
        args.optimized,
        metrics=args.metric or ("lpips",),
        backbone=args.backbone,
        device=args.device,
        progress=not args.no_progress,
    )
    target = Path(args.json) if args.json else Path(f"{Path(args.optimized).stem}.scores.json")
    scores.to_json(target)
    show(
        f"{scores.frames} frames of {scores.height}x{scores.width}: {args.optimized} against {args.original}"
    )
    show(scores.table())
    for note in scores.notes:
        show(f"note: {note}")
    show(f"scores written to {target}")
    return 0


COMMANDS = {"evaluate": Command(HELP, add_arguments, main)}
