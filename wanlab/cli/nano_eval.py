"""`wanlab nano-eval`: scores wan-nano on held-out cases and compares them with its targets."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab import measure, models
from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, write_json
from wanlab.core.paths import default_outputs
from wanlab.core.stats import bootstrap_ratio
from wanlab.engines.pipeline import use_engines
from wanlab.engines.registry import EAGER, ENGINES, engine_kind
from wanlab.evaluate.metrics import compare_videos
from wanlab.heldout.cases import Case, draw_cases
from wanlab.heldout.motion import follows_caption
from wanlab.models.pipeline import Model
from wanlab.runs import prepare

HELP = """Score wan-nano on held-out cases and print the figures beside their targets. The exit status is 1 when a target
is missed. With --json an interrupted examination continues where it stopped."""


class Journal:
    """Rows of finished cases in a file of JSON lines, so that an interrupted examination loses nothing.

    The first line is a key; rows of another key (other weights, engine, backbones or code) are dropped.

    Args:
        path: path of the results; the journal is `<path>.journal`. None writes no file.
        key: hash of everything that the rows depend on.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = None if path is None else path.with_name(path.name + ".journal")
        self.cases: list[list[dict]] = []
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            # An incomplete line is no case.
            self.cases = [json.loads(line) for line in lines[1:] if line.endswith("]")]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in ({"key": key}, *self.cases)))

    def add(self, rows: list[dict]) -> None:
        """Append the rows of one more case."""
        self.cases.append(rows)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(rows) + "\n")

    def done(self) -> None:
        """Delete the file, after the results were written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


VARIANTS = ("both", "high_only", "low_only")
"""Which expert runs the steps: both, or one expert all of them."""

TARGETS = {
    "vae_psnr_db": (">=", 26.0),
    "follows_caption_percent": (">=", 90.0),
    "lpips_below_frozen_percent": (">=", 30.0),
    "high_only_worse_percent": (">", 0.0),
    "low_only_worse_percent": (">", 0.0),
}


def with_one_expert(model: Model, variant: str) -> Model:
    """The model of a variant: with both experts, or with one expert for all steps."""
    if variant == "both":
        return model
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = copy.deepcopy(model.pipeline.scheduler)
    if variant == "high_only":
        pipeline.transformer_2 = model.pipeline.transformer
    else:
        pipeline.transformer = model.pipeline.transformer_2
    return dataclasses.replace(model, pipeline=pipeline)


def reconstruct(model: Model, video: np.ndarray) -> np.ndarray:
    """A video through the VAE and back, `[T, H, W, 3]` in [0, 1]."""
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].to(model.device, model.dtype) * 2 - 1
    with torch.inference_mode():
        latents = model.pipeline.vae.encode(pixels).latent_dist.mode()
        restored = model.pipeline.vae.decode(latents, return_dict=False)[0]
    return ((restored[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy()


def examine(
    model: Model,
    cases: list[Case],
    *,
    variants: Iterable[str] = VARIANTS,
    backbones: Iterable[str] = ("stlpips-alex",),
    journal: Journal | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every case with every variant, and two references: the frozen first frame and the VAE alone.

    Args:
        journal: journal of an interrupted examination; its cases are not computed again, and new ones are added.

    Returns:
        DataFrame with one row per case and video: case, photograph, caption, video ("both", "high_only",
        "low_only", "frozen", "vae"), psnr_db, follows_caption, and lpips_<backbone> per backbone; all scores are
        against the true clip, averaged over frames.
    """
    journal = journal or Journal(None, "")
    todo = list(enumerate(cases))[len(journal.cases) :]
    bar = tqdm(
        todo, "held-out cases", len(cases), initial=len(cases) - len(todo), unit="case", disable=not progress
    )
    for number, case in bar:
        rows = examine_case(model, case, variants=variants, backbones=backbones)
        journal.add([{"case": number, **row} for row in rows])
    return pd.DataFrame([row for rows in journal.cases[: len(cases)] for row in rows])


def examine_case(
    model: Model,
    case: Case,
    *,
    variants: Iterable[str] = VARIANTS,
    backbones: Iterable[str] = ("stlpips-alex",),
) -> list[dict]:
    """The rows of one case, as `examine` describes them."""
    truth, rows = case.truth(), []
    videos = {"frozen": np.repeat(truth[:1], len(truth), axis=0), "vae": reconstruct(model, truth)}
    for variant in variants:
        generation = with_one_expert(model, variant).generate(truth[0], case.caption, seed=case.seed)
        videos[variant] = generation.video
    for name, video in videos.items():
        row: dict[str, Any] = {"photograph": case.photograph, "caption": case.caption, "video": name}
        row["psnr_db"] = float(-10 * np.log10(max(float(np.square(video - truth).mean()), 1e-10)))
        row["follows_caption"] = bool(follows_caption(video, case.clip)) if name in variants else None
        for backbone in backbones:
            scores = compare_videos(truth, video, metrics=("lpips",), backbone=backbone, progress=False)
            row[f"lpips_{backbone}"] = scores.mean("lpips")
        rows.append(row)
    return rows


def summary(table: pd.DataFrame, backbone: str) -> dict[str, Any]:
    """Figures of a table of `examine`, among them those that have targets.

    The 95 % bootstrap interval over cases of a ratio of LPIPS is `<figure>_interval`.
    """
    scores = table.pivot_table(f"lpips_{backbone}", "case", "video")
    psnr = table.pivot_table("psnr_db", "case", "video")
    figures: dict[str, Any] = {
        "cases": len(scores),
        "vae_psnr_db": float(psnr["vae"].mean()),
        "follows_caption_percent": 100 * float(table.loc[table["video"] == "both", "follows_caption"].mean()),
        "lpips_generated": float(scores["both"].mean()),
        "lpips_frozen": float(scores["frozen"].mean()),
        "lpips_vae": float(scores["vae"].mean()),
        "psnr_generated_db": float(psnr["both"].mean()),
        # A clip without motion is its own first frame, of infinite PSNR.
        "psnr_frozen_db": float(psnr["frozen"][psnr["frozen"] < 99].mean()),
    }

    def compared(name: str, above: str, below: str, percent: Callable[[float], float]) -> None:
        figures[name] = percent(float(scores[above].mean() / scores[below].mean()))
        if interval := bootstrap_ratio(scores[above], scores[below], seed=0):
            figures[f"{name}_interval"] = sorted(percent(end) for end in interval)

    compared("lpips_below_frozen_percent", "both", "frozen", lambda ratio: 100 * (1 - ratio))
    for variant in ("high_only", "low_only"):
        if variant in scores:
            figures[f"{variant}_lpips"] = float(scores[variant].mean())
            figures[f"{variant}_psnr_db"] = float(psnr[variant].mean())
            compared(f"{variant}_worse_percent", variant, "both", lambda ratio: 100 * (ratio - 1))
    return figures


def verdicts(figures: dict) -> list[tuple[str, float, str, bool]]:
    """Each target: name, measured value, target in words, whether it is met.

    A target ">" is met where the whole interval is above the limit.
    """
    result = []
    for name, (relation, limit) in TARGETS.items():
        if name in figures:
            value = figures[name]
            least = min(figures.get(f"{name}_interval", [value]))
            met = value >= limit if relation == ">=" else least > limit
            result.append((name, value, f"{relation} {limit:g}", met))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=72, help="held-out cases (default: 72)")
    parser.add_argument("--model", default="wan-nano", help="registry name or folder (default: wan-nano)")
    parser.add_argument(
        "--engine", default=EAGER, help=f"engine of the components that it can run: {', '.join(ENGINES)}"
    )
    parser.add_argument("--backbone", action="append", help="LPIPS backbone; may be given more than once")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--json",
        type=Path,
        help="file for all rows and the figures; an interrupted examination continues from it",
    )


def main(args: argparse.Namespace) -> int:
    """Print the figures beside their targets; the exit status is 1 when a target is missed."""
    if args.cases < 9:
        raise WanlabError(f"--cases must be at least 9, one of each motion, not {args.cases}")
    backbones = tuple(args.backbone or ("stlpips-alex",))
    kind = engine_kind(args.engine)
    kind.check()
    model = models.load(args.model, device=args.device, dtype="float32")
    chosen = {component: kind.name for component in model.components if kind.runs_usually(component)}
    model = use_engines(model, chosen, default_outputs() / "onnx-fixed" / model.spec.name)
    key = digest([prepare.package_digest(), str(prepare.weights_id(args.model)), args.engine, *backbones])
    journal = Journal(args.json, key)
    table = examine(model, draw_cases(args.cases), backbones=backbones, journal=journal)
    results = {backbone: summary(table, backbone) for backbone in backbones}
    for backbone, figures in results.items():
        show(f"\n{figures['cases']} held-out cases, LPIPS backbone {backbone}, {args.engine}")
        for name, value, target, met in verdicts(figures):
            interval = figures.get(f"{name}_interval")
            among = f"   95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
            show(f"  {'met   ' if met else 'MISSED'}  {name:28} {value:8.2f}   target {target}{among}")
        means = {name: value for name, value in figures.items() if name.startswith(("lpips_", "psnr_"))}
        show("  " + ", ".join(f"{k} {v:.3f}" for k, v in means.items() if isinstance(v, float)))
    if args.json:
        content = {
            "engine": args.engine,
            "figures": results,
            "environment": measure.environment(),
            "rows": json.loads(table.to_json(orient="records", double_precision=4)),
        }
        write_json(args.json, content)
        journal.done()
        show(f"\n{args.json}")
    return 0 if all(met for figures in results.values() for *_, met in verdicts(figures)) else 1


COMMANDS = {"nano-eval": Command(HELP, add_arguments, main)}
