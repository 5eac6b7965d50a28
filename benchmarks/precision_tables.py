"""Tables of mixed precision from the JSON under data/results/."""

from __future__ import annotations

from table_text import machine, markdown, read


def precision_speed() -> str:
    """Plans at true size beside compiled BF16, with the bound that Amdahl's law sets."""
    rows = []
    for name in ("precision_ti2v_h200", "precision_a14b_h200"):
        record = read(name)
        settings = record["settings"]
        for variant, row in record["variants"].items():
            if "failed" in row:
                continue
            plan, _, mode = variant.partition(":")
            gain, bound = row.get("gain", {}), row.get("bound", {})
            plain = plan == "as-loaded"
            rows.append(
                [
                    f"{settings['model'].removeprefix('wan2.2-')} {settings['component']}",
                    f"bf16, {mode}" if plain else f"{plan}, {mode}",
                    f"{row['samples']['median_ms']:,.0f} ms",
                    f"{row['noise_percent']:.1f} %",
                    f"{gain['speedup']:.2f}x" if gain else "1",
                    f"{bound['speedup']:.2f}x" if bound else "",
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


TABLES = {"precision_speed": precision_speed}
