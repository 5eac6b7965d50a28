"""`wanlab nano-eval`: scores wan-nano on held-out cases and compares them with its targets."""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from wanlab import measure, models
from wanlab.cli.command import Command, print_table, show
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, write_json
from wanlab.core.paths import default_outputs
from wanlab.core.stats import bootstrap_mean, bootstrap_ratio, ends_text
from wanlab.engines.pipeline import use_engines
from wanlab.engines.registry import EAGER, ENGINES, engine_kind
from wanlab.evaluate.metrics import compare_videos, laplacian
from wanlab.heldout.cases import (
    EXAMINATION,
    MOST_DRAWS,
    SET_SIZE,
    SETS,
    SOURCES,
    Case,
    draw_cases,
    draw_set,
    has_texture,
    picture,
    size_content,
)
from wanlab.heldout.clips import SIZES, SMALL, Clip, draw_clip, prepare_photograph, render
from wanlab.heldout.motion import camera_follows, objects_follow
from wanlab.models.pipeline import Model
from wanlab.models.registry import read_json
from wanlab.runs import prepare

HELP = """Score wan-nano on held-out cases and print the figures beside their targets, and the VAE alone on photographs by
source. --steps and --guidance add a table of quality against settings. The exit status is 1 when a target is missed. With
--json an interrupted examination continues where it stopped."""

JUDGES = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
"""The camera is judged on the CPU, a second a video, while the next video is made."""

CLIPS_PER_PHOTOGRAPH = 4


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


JUDGED_APART = ("camera_follows_percent", "shapes_follow_percent")
"""What following the caption consists of; the target is of both together."""


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
    return replace(model, pipeline=pipeline)


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
        "low_only", "frozen", "vae"), psnr_db, sharpness, follows_caption, camera_follows, shapes, shapes_follow (how many
        of them), and lpips_<backbone> per backbone; all scores are against the true clip, averaged over frames.
    """

    def work(case: Case) -> list[dict]:
        return examine_case(model, case, variants=variants, backbones=backbones)

    return resumed(cases, work, journal, "held-out cases", progress)


def resumed(
    jobs: Sequence[Any],
    work: Callable[[Any], list[dict]],
    journal: Journal | None = None,
    label: str = "",
    progress: bool = True,
) -> pd.DataFrame:
    """The rows of all jobs, each with the number of its job as `case`; those in the journal are not made again."""
    journal = journal or Journal(None, "")
    todo = list(enumerate(jobs))[len(journal.cases) :]
    waiting: deque[tuple[int, list[dict]]] = deque()

    def write(most: int) -> None:
        while len(waiting) > most:
            number, rows = waiting.popleft()
            journal.add([{"case": number, **settled(row)} for row in rows])

    bar = tqdm(todo, label, len(jobs), initial=len(jobs) - len(todo), unit="case", disable=not progress)
    try:
        for number, job in bar:
            waiting.append((number, work(job)))
            write(2)
    finally:
        write(0)
    return pd.DataFrame([row for rows in journal.cases[: len(jobs)] for row in rows])


def settled(row: dict) -> dict:
    """A row whose motion has been judged; waits for it."""
    return {k: v for k, v in row.items() if k != "motion"} | (
        row["motion"].result() if "motion" in row else {}
    )


def examine_case(
    model: Model,
    case: Case,
    *,
    variants: Iterable[str] = VARIANTS,
    backbones: Iterable[str] = ("stlpips-alex",),
) -> list[dict]:
    """The rows of one case, as `examine` describes them; `motion` is still being judged (`settled`)."""
    truth, rows = case.truth(), []
    videos = {"frozen": np.repeat(truth[:1], len(truth), axis=0), "vae": reconstruct(model, truth)}
    for variant in variants:
        videos[variant] = generate(with_one_expert(model, variant), case, truth)
    for name, video in videos.items():
        row: dict[str, Any] = {"photograph": case.photograph, "caption": case.caption, "video": name}
        row |= scores(truth, video, backbones)
        if name in variants:
            row["motion"] = JUDGES.submit(judge_motion, video, case.clip)
        rows.append(row)
    return rows


def generate(model: Model, case: Case, truth: np.ndarray, **settings: Any) -> np.ndarray:
    """The model's video of a case, of the size of its true clip."""
    frames, height, width, _ = truth.shape
    size = {"frames": frames, "height": height, "width": width}
    return model.generate(truth[0], case.caption, seed=case.seed, **size, **settings).video


def scores(truth: np.ndarray, video: np.ndarray, backbones: Iterable[str]) -> dict[str, float]:
    """PSNR, sharpness (the variance of the Laplacian over that of the truth) and LPIPS, averaged over frames."""
    psnr_db = -10 * np.log10(max(float(np.square(video - truth).mean()), 1e-10))
    row = {"psnr_db": float(psnr_db), "sharpness": roughness(video) / roughness(truth)}
    for backbone in backbones:
        compared = compare_videos(truth, video, metrics=("lpips",), backbone=backbone, progress=False)
        row[f"lpips_{backbone}"] = compared.mean("lpips")
    return row


def roughness(video: np.ndarray) -> float:
    """Variance of the Laplacian of the brightness of a video `[T, H, W, 3]`."""
    return max(float(laplacian(video.mean(axis=-1)).var()), 1e-12)


def judge_motion(video: np.ndarray, clip: Clip) -> dict[str, Any]:
    """Whether a video moves as the caption of its clip says: camera and shapes together, and each apart."""
    camera, shapes = bool(camera_follows(video, clip)), objects_follow(video, clip)
    return {
        "follows_caption": camera and all(shapes),
        "camera_follows": camera,
        "shapes": len(shapes),
        "shapes_follow": sum(map(bool, shapes)),
    }


def examine_settings(
    model: Model,
    cases: list[Case],
    settings: Sequence[Mapping[str, float]],
    *,
    backbones: Iterable[str] = ("stlpips-alex",),
    journal: Journal | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every case with each of some settings: a row per case and setting, with its steps and guidance_scale."""

    def work(case: Case) -> list[dict]:
        truth, rows = case.truth(), []
        for setting in settings:
            video = generate(model, case, truth, **setting)
            motion = JUDGES.submit(judge_motion, video, case.clip)
            rows.append({**setting, **scores(truth, video, backbones), "motion": motion})
        return rows

    return resumed(cases, work, journal, "settings", progress)


def held_out_photographs(folder: Path | None) -> list[tuple[str, np.ndarray]]:
    """Source and picture, float32 `[H, W, 3]` in [0, 1], of every held-out photograph.

    Args:
        folder: folder of `training.photographs`, which has sources that the repository does not contain.

    Raises:
        WanlabError: the folder has no index, or not its photographs.
    """
    found = [(source, picture(name)) for source, names in SOURCES.items() for name in names]
    if folder is None:
        return found
    try:
        rows = [row for row in read_json(folder / "index.json")["photographs"] if row["held_out"]]
        for row in rows:
            with Image.open(folder / "heldout" / f"{row['name']}.jpg") as image:
                found.append((row["package"], prepare_photograph(image)))
    except (OSError, KeyError, TypeError, WanlabError) as error:
        raise WanlabError(
            f"{folder} holds no held-out photographs ({error}); make it with python -m training.photographs --to {folder}"
        ) from error
    return found


def examine_vae(
    model: Model,
    photographs: Sequence[tuple[str, np.ndarray]],
    size: tuple[int, int, int],
    *,
    backbones: Iterable[str] = ("stlpips-alex",),
    journal: Journal | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the VAE alone on clips of photographs without shapes: a row per clip, with its source.

    Args:
        photographs: source and picture, as `held_out_photographs` gives them.
        size: height, width and frames of the clips.
    """

    def work(job: tuple[int, tuple[str, np.ndarray]]) -> list[dict]:
        number, (source, image) = job
        generator, rows = np.random.default_rng((2026, number)), []
        height, width, frames = size
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        for _ in range(CLIPS_PER_PHOTOGRAPH):
            for _ in range(MOST_DRAWS):
                clip = draw_clip(
                    image.shape[:2], generator, objects=0, height=height, width=width, frames=frames
                )
                first = render(pixels, [clip], frames=1)[0, :, 0].permute(1, 2, 0)
                if has_texture(first.numpy()):  # a clear sky has no sharpness to lose
                    break
            truth = render(pixels, [clip])[0].permute(1, 2, 3, 0).numpy()
            rows.append({"source": source, **scores(truth, reconstruct(model, truth), backbones)})
        return rows

    return resumed(list(enumerate(photographs)), work, journal, "photographs", progress)


def summary(table: pd.DataFrame, backbone: str) -> dict[str, Any]:
    """Figures of a table of `examine`, among them those that have targets.

    The 95 % bootstrap interval over cases of a share or of a ratio of LPIPS is `<figure>_interval`.
    """
    scores = table.pivot_table(f"lpips_{backbone}", "case", "video")
    psnr = table.pivot_table("psnr_db", "case", "video")
    both = table[table["video"] == "both"]
    figures: dict[str, Any] = {
        "cases": len(scores),
        "vae_psnr_db": float(psnr["vae"].mean()),
        **motion_figures(both),
        "lpips_generated": float(scores["both"].mean()),
        "lpips_frozen": float(scores["frozen"].mean()),
        "lpips_vae": float(scores["vae"].mean()),
        "psnr_generated_db": float(psnr["both"].mean()),
        # A clip without motion is its own first frame, of infinite PSNR.
        "psnr_frozen_db": float(psnr["frozen"][psnr["frozen"] < 99].mean()),
    }
    if "sharpness" in table:
        for video, name in (("both", "generated"), ("vae", "vae")):
            figures[f"sharpness_{name}"] = float(table.loc[table["video"] == video, "sharpness"].mean())

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


def motion_figures(rows: pd.DataFrame) -> dict[str, Any]:
    """Shares, in percent with their intervals, of videos that follow the caption, of cameras that do, and of shapes."""
    figures: dict[str, Any] = {}
    for name in ("follows_caption", "camera_follows"):
        if name in rows:
            _add(figures, f"{name}_percent", 100 * rows[name].astype(float))
    if "shapes" in rows:
        shown = rows[rows["shapes"] > 0].astype({"shapes": float, "shapes_follow": float})
        if len(shown):
            followed, shapes = shown["shapes_follow"], shown["shapes"]
            figures["shapes_follow_percent"] = 100 * float(followed.sum() / shapes.sum())
            if interval := bootstrap_ratio(followed, shapes, seed=0):
                figures["shapes_follow_percent_interval"] = [100 * end for end in interval]
    return figures


def _add(figures: dict[str, Any], name: str, values: pd.Series) -> None:
    """Add the mean of some values and its interval."""
    figures[name] = float(values.mean())
    if interval := bootstrap_mean(values, seed=0):
        figures[f"{name}_interval"] = list(interval)


def grouped(table: pd.DataFrame, by: Sequence[str], backbones: Iterable[str]) -> list[dict[str, Any]]:
    """Mean scores, each with its interval, of the rows that agree in some columns, in the order of their first rows."""
    result = []
    for values, rows in table.groupby(list(by), sort=False):
        figures: dict[str, Any] = dict(zip(by, values, strict=True)) | {"clips": len(rows)}
        for column in ("psnr_db", "sharpness", *(f"lpips_{backbone}" for backbone in backbones)):
            _add(figures, column, rows[column])
        result.append(figures | motion_figures(rows))
    return result


LABELS = {
    "psnr_db": ("PSNR, dB", ".2f"),
    "sharpness": ("sharpness", ".2f"),
    "camera_follows_percent": ("camera follows, %", ".1f"),
    "shapes_follow_percent": ("shapes follow, %", ".1f"),
}
"""Figure -> the head of its column, and how it is written."""


def show_groups(title: str, groups: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    """Print a table of `grouped`: one line for each group, with 95 % intervals over clips."""
    lpips = [name for name in groups[0] if name.startswith("lpips_") and not name.endswith("_interval")]
    labels = LABELS | {name: (name.replace("lpips_", "LPIPS "), ".3f") for name in lpips}
    labels = {name: label for name, label in labels.items() if any(name in figures for figures in groups)}

    def cell(figures: Mapping[str, Any], name: str, form: str) -> str:
        if name not in figures:
            return ""
        ends = figures.get(f"{name}_interval")
        return f"{figures[name]:{form}}" + (f" ({ends_text(ends[0], ends[1], form)})" if ends else "")

    show(f"\n{title}; in brackets 95 % intervals over clips")
    print_table(
        [*(column.replace("_", " ") for column in by), "clips", *(label for label, _ in labels.values())],
        [
            [
                *(each[column] for column in by),
                each["clips"],
                *(cell(each, name, form) for name, (_, form) in labels.items()),
            ]
            for each in groups
        ],
        cut=True,
    )


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
        "--size", default=SMALL, help="small, large, or HEIGHTxWIDTHxFRAMES (default: small, 128x192x17)"
    )
    parser.add_argument(
        "--set",
        choices=(EXAMINATION, *SETS),
        default=EXAMINATION,
        help="a fixed set of the size, in place of cases of this command's own",
    )
    parser.add_argument(
        "--shapes", type=int, nargs="+", help="numbers of shapes that cases show in turn (default: by size)"
    )
    parser.add_argument(
        "--textures", type=float, help="share of cases that show a texture (default: by size)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="also score these numbers of steps")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[], help="also score these guidance scales; 1 is without"
    )
    parser.add_argument(
        "--photographs", type=Path, help="folder of training.photographs: more sources for the VAE alone"
    )
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


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    content = size_content(args.size)
    asked = {"objects": args.shapes, "textures": args.textures}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.set == EXAMINATION:
        return draw_cases(args.cases, **content | asked)
    if asked or args.size not in SIZES or args.cases > SET_SIZE:
        raise WanlabError(
            f"set {args.set} has {SET_SIZE} fixed cases at the sizes {' and '.join(SIZES)}: leave --shapes and --textures"
            " out, or leave --set out"
        )
    return draw_set(args.set, args.size)[: args.cases]


def main(args: argparse.Namespace) -> int:
    """Print the figures beside their targets; the exit status is 1 when a target is missed."""
    if args.cases < 9:
        raise WanlabError(f"--cases must be at least 9, one of each motion, not {args.cases}")
    backbones = tuple(args.backbone or ("stlpips-alex",))
    kind = engine_kind(args.engine)
    kind.check()
    cases, photographs = chosen_cases(args), held_out_photographs(args.photographs)
    size = {name: getattr(cases[0].clip, name) for name in ("height", "width", "frames")}
    model = models.load(args.model, device=args.device, dtype="float32")
    usual = model.spec.defaults
    model = replace(model, spec=replace(model.spec, defaults=replace(usual, **size)))
    graphs = default_outputs() / "onnx-fixed" / model.spec.name
    if model.spec.defaults != usual:  # a graph of fixed shapes is of one size
        graphs = graphs.with_name("{}-{height}x{width}x{frames}".format(model.spec.name, **size))
    chosen = {component: kind.name for component in model.components if kind.runs_usually(component)}
    model = use_engines(model, chosen, graphs)
    settings = [{"steps": steps, "guidance_scale": usual.guidance_scale} for steps in args.steps]
    settings += [{"steps": usual.steps, "guidance_scale": guidance} for guidance in args.guidance]
    key = digest(
        [prepare.package_digest(), str(prepare.weights_id(args.model)), args.engine, args.set, *backbones]
        + [str(each) for each in (size, settings, args.shapes, args.textures, args.photographs)]
    )
    journals = {
        part: Journal(args.json and args.json.with_name(args.json.name + part), key)
        for part in ("", ".settings", ".vae")
    }
    ask: dict[str, Any] = {"backbones": backbones}
    table = examine(model, cases, journal=journals[""], **ask)
    by_setting = (
        examine_settings(model, cases, settings, journal=journals[".settings"], **ask) if settings else None
    )
    by_source = examine_vae(model, photographs, tuple(size.values()), journal=journals[".vae"], **ask)

    results = {backbone: summary(table, backbone) for backbone in backbones}
    shown = "{height}x{width}x{frames}".format(**size)
    for backbone, figures in results.items():
        show(f"\n{figures['cases']} held-out cases of {shown}, LPIPS backbone {backbone}, {args.engine}")
        lines = [(("met" if met else "MISSED"), *each, f"target {t}") for *each, t, met in verdicts(figures)]
        lines += [("", name, figures[name], "") for name in JUDGED_APART if name in figures]
        for met, name, value, target in lines:
            interval = figures.get(f"{name}_interval")
            among = f"   95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
            show(f"  {met:6}  {name:28} {value:8.2f}   {target:13}{among}".rstrip())
        means = {
            name: value
            for name, value in figures.items()
            if name.startswith(("lpips_", "psnr_", "sharpness_"))
        }
        show("  " + ", ".join(f"{k} {v:.3f}" for k, v in means.items() if isinstance(v, float)))
    tables = {
        "by_shapes": (table[table["video"] == "both"], ["shapes"], "Generated videos by number of shapes"),
        "by_setting": (by_setting, ["steps", "guidance_scale"], "Generated videos by setting"),
        "by_source": (by_source, ["source"], "The VAE alone on held-out photographs, by source"),
    }
    groups = {}
    for name, (rows, by, title) in tables.items():
        if rows is not None:
            groups[name] = grouped(rows.astype({"shapes": int}) if by == ["shapes"] else rows, by, backbones)
            show_groups(title, groups[name], by)
    if args.json:
        content = {
            "engine": args.engine,
            "size": size,
            "set": args.set,
            "figures": results,
            **groups,
            "environment": measure.environment(),
            "rows": json.loads(table.to_json(orient="records", double_precision=4)),
        }
        write_json(args.json, content)
        for journal in journals.values():
            journal.done()
        show(f"\n{args.json}")
    return 0 if all(met for figures in results.values() for *_, met in verdicts(figures)) else 1


COMMANDS = {"nano-eval": Command(HELP, add_arguments, main)}
