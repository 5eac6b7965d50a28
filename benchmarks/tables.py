"""Write the result tables of the README and the model card from the JSON under data/results/.

    python benchmarks/tables.py          # rewrite the tables
    python benchmarks/tables.py --check  # exit status 1 when a table is not what the JSON says

No figure is typed by hand: each table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys

import conversion_tables
import diagnosis_tables
import family_tables
import input_tables
import precision_tables
import report_tables
import results_table
import sweep_tables
import technique_tables
from table_text import ROOT, machine, markdown, read

from wanlab.cli.nano_eval import verdicts
from wanlab.pages.templates import glossary_markdown

PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "README.md",
    ROOT / "docs" / "tour.md",
    ROOT / "docs" / "yaml.md",
    *sorted(report_tables.QUESTIONS.glob("*.md")),
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "diagnosis.md",
    ROOT / "docs" / "conversion.md",
    ROOT / "docs" / "glossary.md",
    ROOT / "docs" / "input.md",
    ROOT / "docs" / "models.md",
    ROOT / "docs" / "precision.md",
    ROOT / "docs" / "sweeps.md",
    ROOT / "docs" / "techniques.md",
    ROOT / "data" / "wan-nano" / "README.md",
)


def h200() -> str:
    rows, environment = [], None
    for run in read("h200_baseline")["runs"]:
        p, b, environment = run["parameters"], run["baseline"], run["environment"]
        shares = {row["component"]: row for row in run["breakdown"]}
        forward = ", ".join(f"{f['median_ms']:,.0f}" for f in run["forward"])
        rows.append(
            [
                p["model"],
                f"{p['height']}x{p['width']}x{p['frames']}",
                forward,
                f"{shares['vae_decoder']['time_ms']:,.0f}",
                f"{b['time_per_video_ms']:,.0f}",
                f"{b['noise_percent']:.1f} %",
                f"{b['allocated_gib']:.1f}",
            ]
        )
    header = [
        "model",
        "size",
        "expert forward ms",
        "VAE decode ms",
        "video, 2 steps, ms",
        "A/A noise",
        "peak GiB",
    ]
    note = f"\n\n{machine(environment)}; eager BF16, random weights, no guidance, `10_baseline`."
    return markdown(header, rows) + note


def onnxruntime() -> str:
    record = read("onnxruntime_cpu")
    gain = record["comparison"]
    lines = [["whole video, median", gain["baseline_ms"], gain["candidate_ms"]]]
    lines += [[row["component"], row["eager_ms"], row["onnxruntime_ms"]] for row in record["stages"]]
    rows = [[name, f"{a:,.0f} ms", f"{b:,.0f} ms", f"{a / b:.2f}x"] for name, a, b in lines]
    note = (
        f"\n\n{machine(record['environment'])}; 17 frames 128x192, {len(record['samples']['eager']['values_ms'])} "
        f"generations each. Speed-up {gain['low']:.2f} to {gain['high']:.2f} (95 % interval; A/A noise "
        f"{gain['noise_percent']:.1f} %). PSNR between the two videos: {record['psnr_db']:.0f} dB."
    )
    return markdown(["wan-nano", "eager PyTorch", "ONNX Runtime", "ratio"], rows) + note


def among(figures: dict, key: str) -> str:
    """A figure's interval in brackets, where it has one."""
    interval = figures.get(f"{key}_interval")
    return f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""


def heldout() -> str:
    record = read("wan_nano_heldout")
    names = {
        "vae_psnr_db": "VAE reconstruction, PSNR",
        "follows_caption_percent": "motion follows the caption",
        "lpips_below_frozen_percent": "LPIPS below the frozen first frame",
        "high_only_worse_percent": "every step on the high-noise expert: LPIPS worse by",
        "low_only_worse_percent": "every step on the low-noise expert: LPIPS worse by",
    }
    figures, rows = record["figures"], []
    backbones = list(figures)
    for judged in zip(*(verdicts(figures[backbone]) for backbone in backbones), strict=True):
        key, _, target, _ = judged[0]
        unit = "dB" if key.endswith("_db") else "%"
        cells = [
            f"{value:.1f} {unit}" + among(figures[b], key)
            for b, (_, value, _, _) in zip(backbones, judged, strict=True)
        ]
        each = ["met" if ok else "**missed**" for *_, ok in judged]
        rows.append(
            [names[key], *cells, f"{target} {unit}", each[0] if len(set(each)) == 1 else ", ".join(each)]
        )
    apart = {"camera_follows_percent": "the camera alone", "shapes_follow_percent": "shapes, each alone"}
    rows += [
        [label, *(f"{figures[b][key]:.1f} %" + among(figures[b], key) for b in backbones), "", ""]
        for key, label in apart.items()
        if key in figures[backbones[0]]
    ]
    means = [
        [f"LPIPS to the truth: {label}", *(f"{figures[b][k]:.3f}" for b in backbones), "", ""]
        for label, k in (
            ("generated", "lpips_generated"),
            ("VAE alone", "lpips_vae"),
            ("frozen", "lpips_frozen"),
        )
    ]
    count = figures[backbones[0]]["cases"]
    note = f"\n\n{count} cases; {machine(record['environment'])}; `wanlab nano-eval`. In brackets 95 % intervals over cases."
    return markdown(["figure", *backbones, "target", ""], rows + means) + note


TABLES = {"h200": h200, "onnxruntime": onnxruntime, "heldout": heldout} | diagnosis_tables.TABLES
TABLES |= conversion_tables.TABLES | precision_tables.TABLES | sweep_tables.TABLES | results_table.TABLES
TABLES |= input_tables.TABLES | family_tables.TABLES | report_tables.TABLES
TABLES |= {"glossary": glossary_markdown, "techniques": technique_tables.techniques}
TABLES |= {"attention_kernels": technique_tables.attention_kernels}


def rewritten(text: str) -> str:
    def table(match: re.Match) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    for page in PAGES:
        text = page.read_text()
        if rewritten(text) != text:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                page.write_text(rewritten(text))
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if '--check' in sys.argv[1:] else 'rewritten'}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
