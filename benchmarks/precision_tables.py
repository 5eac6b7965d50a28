"""Tables of mixed precision from the JSON under data/results/."""

from __future__ import annotations

from table_text import machine, markdown, read


def precision_speed() -> str:
    """Plans at true size beside compiled BF16, with the bound that Amdahl's law sets."""
    rows = []
    for name in ("precision_ti2v_h200", "precision_a14b_h200", "precision_a14b_plan_h200"):
        record = read(name)
        settings = record["settings"]
        for variant, row in record["variants"].items():
            plan, _, mode = variant.partition(":")
            # The last of them was run for the plan in it, against a baseline of its own.
            if "failed" in row or (settings["plan"] and plan in ("as-loaded", "uniform-fp8")):
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
        "relative L2",
        "products",
    ]
    ti2v, a14b = (read(name)["settings"] for name in ("precision_ti2v_h200", "precision_a14b_h200"))
    sizes = ", ".join(f"{s['model']} {s['height']}x{s['width']}x{s['frames']}" for s in (ti2v, a14b))
    return markdown(header, rows) + (
        f"\n\n{sizes}; random weights, batch 1; {machine(read('precision_a14b_h200')['environment'])}. Bound: the linear"
        " layers at the measured rate of their 8-bit products, all else as in compiled bf16. Relative L2 to eager bf16."
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
    """LPIPS of two clips of true size, beside the official package frame by frame."""
    record = read("lpips_speed_h200")
    names = [name for name in record["samples"] if not name.startswith("batch of")]
    rows = []
    for name in names:
        ratio = record["ratios"].get(name)
        rows.append(
            [
                name,
                f"{record['samples'][name]['median_ms']:,.0f} ms",
                f"{ratio['speedup']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1",
                f"{record['largest_score_difference'][name]:.1g}",
            ]
        )
    header = ["way", "time", "wanlab is faster by", "largest difference of a score"]
    frames, height, width = record["settings"]["size"]
    return markdown(header, rows) + (
        f"\n\n{frames} frames of {height}x{width}, {record['settings']['backbone']}; {machine(record['environment'])}. "
        "Scores are held against the package's own in float32 without TF32."
    )


TABLES = {
    "precision_speed": precision_speed,
    "plan_choice": plan_choice,
    "plan_agreement": plan_agreement,
    "lpips_speed": lpips_speed,
}
