"""Tables of mixed precision from the JSON under data/results/."""

from __future__ import annotations

from new_records import variants_record
from table_text import machine, markdown, read

from wanlab.core.stats import ends_text

BESIDE = ("as-loaded", "uniform-fp8", "ffn-fp8")
"""What a record of selected plans measures again as its own baseline; the tables show it once."""


def precision_speed() -> str:
    """Plans at true size beside compiled BF16, with the bound that Amdahl's law sets."""
    rows, again = [], []
    for name in (
        "precision_ti2v_h200",
        "precision_a14b_h200",
        "precision_selected_ti2v",
        "precision_selected_a14b",
    ):
        record = read(name, variants_record)
        settings = record["settings"]
        for variant, row in record["variants"].items():
            plan, _, mode = variant.partition(":")
            if settings["plan"] and plan in BESIDE:
                if plan == BESIDE[0]:
                    again.append(f"{row['samples']['median_ms']:,.0f} ms")
                continue
            if "failed" in row:
                continue
            gain, bound = row.get("gain", {}), row.get("bound", {})
            plain = plan == "as-loaded"
            places = 3 if gain and abs(gain["speedup"] - 1) < 0.03 else 2
            rows.append(
                [
                    f"{settings['model'].removeprefix('wan2.2-')} {settings['component']}",
                    f"bf16, {mode}" if plain else f"{plan}, {mode}",
                    f"{row['samples']['median_ms']:,.0f} ms",
                    f"{row['noise_percent']:.1f} %",
                    f"{gain['speedup']:.{places}f}x" if gain else "1",
                    f"{bound['speedup']:.{places}f}x" if bound else "",
                    f"{row['component_gib']:.1f} GiB",
                    f"{row['peak_gib']:.1f} GiB",
                    f"{row['distance']['relative_l2']:.3f}" if row["distance"]["relative_l2"] else "",
                    "" if plain else _kernel(row["kernels"]),
                ]
            )
    header = [
        "expert",
        "plan",
        "forward",
        "A/A noise",
        "against compiled bf16",
        "bound",
        "weights",
        "peak memory",
        "relative L2",
        "products",
    ]
    ti2v, a14b = (
        read(name, variants_record)["settings"] for name in ("precision_ti2v_h200", "precision_a14b_h200")
    )
    where = machine(read("precision_a14b_h200", variants_record)["environment"])
    sizes = ", ".join(f"{s['model']} {s['height']}x{s['width']}x{s['frames']}" for s in (ti2v, a14b))
    return markdown(header, rows) + (
        f"\n\n{sizes}; random weights, batch 1; {where}. Bound: the linear"
        " layers at the measured rate of their 8-bit products, all else as in compiled bf16. Peak memory: weights of the"
        " expert and what one forward adds. Relative L2 to eager bf16. Selected plans are held against compiled bf16"
        f" timed with them ({' and '.join(again)}; both GPUs of one host were at work)."
    )


def _kernel(kernels: list[dict]) -> str:
    """The product that took most time, by its own name."""
    linear = [row for row in kernels if row["kind"] == "linear"]
    codes = [row for row in linear if "qq" in row["name"] or "s8" in row["name"] or "e4m3" in row["name"]]
    if not codes:
        return ""
    name = codes[0]["name"].removeprefix("void ")
    inside = name.partition("<")[2]
    return f"`{(inside or name).split('_v_')[0].split('_h_')[0].rstrip('>(')[:44]}`"


def plan_choice() -> str:
    """The plan that was chosen by measurement beside plans picked by hand, on cases nothing was chosen by."""
    record = read("plan_choice_h200")
    rows = []
    for row in record["final"]:
        first = row["plan"] == "selected"
        rows.append(
            [
                f"**{row['plan']}**" if first else row["plan"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['share_8bit_percent']:.0f} %",
                interval(row, "loss", 2, " %", percent="_percent", sign="+"),
                interval(row, "lpips", 4),
                "" if first else interval(row, "lpips_more", 4, sign="+"),
                "" if first else interval(row, "loss_percent_more", 2, sign="+"),
            ]
        )
    header = [
        "plan",
        "bits per linear weight",
        "in 8 bits or fewer",
        "quality loss",
        "LPIPS to the original",
        "LPIPS more than selected",
        "quality loss more than selected, points",
    ]
    search, size = record["search"], record["final"][0]
    return markdown(header, rows) + (
        f"\n\nwan-nano on {machine(record['environment'])}, {record['dtype']}; {size['cases']} cases of the set `final`, "
        f"95 % bootstrap intervals, paired where plans are compared; LPIPS floor {size['lpips_floor']:.4f} (another exact "
        f"attention kernel). Search: {search['forwards']:,.0f} forwards, {search['percent_of_brute_force']:.1f} % of "
        f"rounding every layer alone ({search['formula']})."
    )


def interval(row: dict, name: str, places: int, unit: str = "", *, percent: str = "", sign: str = "") -> str:
    """A mean with its interval."""
    middle, low, high = (row[f"{name}{end}{percent}"] for end in ("", "_low", "_high"))
    return f"{middle:{sign}.{places}f}{unit} ({low:{sign}.{places}f} to {high:{sign}.{places}f})"


def plan_agreement() -> str:
    """The selected plan in three applications."""
    record = read("plan_agreement_cpu")
    rows = [
        [
            row["component"],
            row["application"],
            f"{row['relative_l2']:.4f}" if row["executed"] else "not executed",
            f"{row['to_pytorch']:.4f}" if row["executed"] else "",
            "" if row["layers"] is None else f"{row['layers_as_asked']:.0f} of {row['layers']:.0f}",
            {True: "yes", False: "**no**", None: ""}[row["agrees"]],
        ]
        for row in record["rows"]
    ]
    header = ["expert", "application", "relative L2 to float32", "to PyTorch's", "layers as asked", "agrees"]
    return markdown(header, rows) + f"\n\n{record['settings']['plan']}; {machine(record['environment'])}."


def lpips_speed() -> str:
    """LPIPS of two clips, beside the official package frame by frame: of true size on a GPU, of wan-nano's on the CPU."""
    rows, notes = [], []
    for name in ("lpips_speed_h200", "lpips_speed_cpu"):
        record = read(name)
        frames, height, width = record["settings"]["size"]
        on_gpu = record["environment"]["gpu"] is not None
        for way, samples in record["samples"].items():
            if way.startswith("batch of") or (way.endswith("no TF32") and not on_gpu):
                continue
            ratio = record["ratios"].get(way)
            rows.append(
                [
                    f"{frames}x{height}x{width}, {'GPU' if on_gpu else 'CPU'}",
                    way,
                    f"{samples['median_ms']:,.0f} ms",
                    f"{ratio['speedup']:.2f}x ({ends_text(ratio['low'], ratio['high'])})" if ratio else "1",
                    f"{record['largest_score_difference'][way]:.1g}",
                ]
            )
        said = (
            f"{machine(record['environment'])}: wanlab against itself {record['noise_percent']:.1f} % apart"
        )
        notes.append(said)
    header = ["clips", "way", "time", "wanlab is faster by", "largest difference of a score"]
    return markdown(header, rows) + (
        f"\n\n{record['settings']['backbone']}; {'; '.join(notes)}. Scores are held against the package's own in float32"
        " without TF32."
    )


def sensitivity() -> str:
    """What a run of 30_sensitivity found: is the prediction right, what did it cost, which expert tolerates less."""
    record = read("sensitivity_cpu")
    told, cost = record["prediction"], record["cost"]
    rows = [
        [
            f"rank correlation with {told['generations']} generations",
            f"{told['rank_correlation']:.3f} ({ends_text(told['low'], told['high'], '.3f')})",
        ],
        ["of single layers alone", f"{told['layer_rank_correlation']:.3f}"],
        ["of one case with the other", f"{told['between_cases']:.3f}"],
        ["true over predicted effect, median", f"{told['scale']:.2f}"],
        [
            "cost of the search",
            f"{cost['forward_equivalents']:,.0f} forwards' worth, {cost['percent_of_brute_force']:.1f} % of the"
            f" {cost['brute_force']:,.0f} of rounding one layer at a time",
        ],
    ]
    words = {"effect": "effect on the final latents", "velocity_error": "velocity error"}
    names = {
        "expert_high": "the high-noise expert",
        "expert_low": "the low-noise expert",
        "neither": "neither",
    }
    for row in record["tolerance"]:
        # Said the way round in which it is above 1.
        turned = [1 / row[name] for name in ("ratio", "high", "low")]
        value, low, high = turned if row["ratio"] < 1 else (row["ratio"], row["low"], row["high"])
        over = "low over high noise" if row["ratio"] < 1 else "high over low noise"
        rows.append(
            [
                f"{row['format']}: {words[row['quantity']]}, {over}",
                f"{value:.3g} ({ends_text(low, high, '.3g')}): {names[row['less_tolerant']]} tolerates less",
            ]
        )
    settings = record["settings"]
    size = f"{settings['height']}x{settings['width']}x{settings['frames']}, {settings['steps']} steps"
    return markdown(["what", "found"], rows) + (
        f"\n\nwan-nano at {size}; {settings['examples']} recorded examples, {settings['samples']} choices of layers, format"
        f" and steps really rounded in {settings['cases']} held-out cases; 95 % bootstrap intervals;"
        f" {machine(record['environment'])}."
    )


def floors() -> str:
    """What the unchanged model differs from itself by."""
    rows, notes = [], []
    for name in ("floors_cpu", "floors_h200"):
        record = read(name)
        found = {(row["floor"], row["metric"]): row for row in record["floors"]}
        gpu = record["environment"].get("gpu")
        settings = record["settings"]
        for floor, run in record["notes"].items():
            lpips, psnr = found[floor, "lpips"], found[floor, "psnr"]
            same = lpips["identical_cases"] == lpips["cases"]
            rows.append(
                [
                    f"{gpu['name'] if gpu else 'CPU'}, {settings['dtype']}",
                    floor,
                    run,
                    f"{psnr['identical_cases']} of {psnr['cases']}",
                    "0" if same else f"{lpips['mean']:.2g} ({ends_text(lpips['low'], lpips['high'], '.2g')})",
                    "" if same else f"{psnr['mean']:.1f} dB ({ends_text(psnr['low'], psnr['high'], '.1f')})",
                ]
            )
        notes.append(machine(record["environment"]))
    frames, height, width = settings["size"]
    header = ["where", "floor", "what was run", "cases that are identical", "LPIPS", "PSNR"]
    return markdown(header, rows) + (
        f"\n\nwan-nano, {height}x{width}x{frames}, {settings['steps']} steps; {settings['cases']} cases, 95 % bootstrap"
        f" intervals; LPIPS by {found[floor, 'lpips']['backbone']}; {'; '.join(notes)}."
    )


TABLES = {
    "precision_speed": precision_speed,
    "plan_choice": plan_choice,
    "plan_agreement": plan_agreement,
    "lpips_speed": lpips_speed,
    "sensitivity": sensitivity,
    "floors": floors,
}
