"""Tables of the diagnosis: from the recorded traces under data/traces/ and the JSON under data/results/."""

from __future__ import annotations

import json

from table_text import ROOT, machine, markdown, read

TRACES = {
    "I2V-A14B, 720x1280x81": "wan2.2-i2v-a14b",
    "TI2V-5B, 704x1280x121": "wan2.2-ti2v-5b",
    "TI2V-5B, blocks compiled": "wan2.2-ti2v-5b-compiled",
}


def _trace(name: str):
    from wanlab import diagnose

    return diagnose.read_trace(ROOT / "data" / "traces" / f"{name}.pt.trace.json.gz")


def breakdown() -> str:
    """Shares of the wall clock, and of A14B what they reach of the roofline and could buy."""
    from wanlab import diagnose, measure, plots

    found = {title: diagnose.breakdown(_trace(name)) for title, name in TRACES.items()}
    first = next(iter(found.values()))
    limits = diagnose.bounds(first, measure.recorded_ceilings("NVIDIA H200")).set_index("category")
    rows = []
    for category in first.frame["category"]:
        shares = [f"{b.share_percent(category):.1f} %" for b in found.values()]
        if any(b.share_percent(category) >= 0.05 for b in found.values()):
            reached = limits.loc[category, "of_roofline_percent"]
            of = "" if reached != reached else f"{reached:.0f} %"
            rows.append(
                [plots.CATEGORY_NAMES[category], *shares, of, f"{limits.loc[category, 'amdahl_bound']:.2f}x"]
            )
    rows.append(
        ["wall clock under the profiler", *(f"{b.wall_ms / 1e3:.1f} s" for b in found.values()), "", ""]
    )
    rows.append(
        ["sum of the rows, off by", *(f"{abs(b.residual_percent):.2f} %" for b in found.values()), "", ""]
    )
    experts = first.experts().set_index(["component", "category"]).loc[("expert_high", "self_attention")]
    environment = json.loads((ROOT / "data" / "traces" / "environment.json").read_text())
    note = (
        f"\n\n{machine(environment)}; BF16, random weights, guidance, 2 steps (A14B: one on each expert). Of the roofline: "
        "least time for the recorded operators over time spent. At most: the whole if the row cost nothing, A14B. In an "
        f"expert of A14B self-attention is {experts['flop_percent']:.1f} % of the operations and "
        f"{experts['share_percent']:.1f} % of the time."
    )
    return markdown(["share of the wall clock", *found, "of the roofline", "at most"], rows) + note


def explore() -> str:
    """Answers to two ready questions on the recorded traces: chains that are not fused, and work above its roofline."""
    from wanlab import diagnose, plots

    rows = []
    for title, name in list(TRACES.items())[:2]:
        view = diagnose.explore(_trace(name))
        for row in view.ask("not_fused").head(2).itertuples():
            what = f"pointwise kernels one after another, {row.kernels:.1f} in a chain"
            rows.append([title, f"`{row.part}`", what, f"{row.time_ms:,.0f} ms", f"{row.saves_ms:,.0f} ms"])
        for row in view.ask("far_from_roofline").head(2).itertuples():
            what = f"{plots.CATEGORY_NAMES[row.category]}, one kernel at {row.of_roofline_percent:.0f} % of its roofline"
            rows.append([title, f"`{row.shapes}`", what, f"{row.time_ms:,.0f} ms", f"{row.lost_ms:,.0f} ms"])
    heads = ["trace", "module or shapes", "what", "time", "gone at most"]
    return markdown(heads, rows) + "\n\n`not_fused` and `far_from_roofline`, the two largest answers of each."


def switch() -> str:
    record = read("expert_switch_h200")
    names = {
        "resident": "both experts on the GPU",
        "pageable": "swapped from pageable memory",
        "pinned": "swapped from pinned memory",
        "prefetched": "prefetched on a side stream during the last high-noise forward",
    }
    rows = []
    for row in record["rows"]:
        moved = f"{row['gb_per_s']:.1f} GB/s" if row["gb_per_s"] else ""
        hidden = f"{row['hidden_percent']:.1f} %" if row["way"] == "prefetched" else ""
        rows.append(
            [names[row["way"]], f"{row['time_ms']:,.1f} ms", f"{row['noise_ms']:,.1f} ms", moved, hidden]
        )
    lock_s, rounds = record["lock_ms"] / 1e3, record["settings"]["samples"]
    note = (
        f"\n\n{machine(record['environment'])}; {record['size_bytes'] / 1e9:.1f} GB each, 720x1280x81; {rounds} rounds, "
        f"page-locking {lock_s:.1f} s once per load. Noise: largest distance of two equal calls in a round."
    )
    return markdown(["a switch of experts", "the video waits", "noise", "transfer", "hidden"], rows) + note


def attention() -> str:
    record = read("attention_h200")
    kernels, taken = record["kernels"], record["map"]
    rows = [
        [
            row["kernel"],
            f"{row['time_ms']:,.0f} ms" if row["time_ms"] else row["reason"],
            f"{row['tflop_per_s']:,.0f}" if row["tflop_per_s"] else "",
            f"{row['low']:.2f} to {row['high']:.2f}" if row["low"] and row["verdict"] != "baseline" else "",
            f"{row['density_percent']:.0f} %",
        ]
        for row in kernels["table"]
    ]
    facts = kernels["facts"]
    peak, before, heads = taken["peak_gib"], taken["before_gib"], taken["rows"] // 4
    note = (
        f"\n\n{machine(taken['environment'])}; {facts['tokens']:,} tokens, {facts['heads']} heads of {facts['dim']}, BF16; "
        f"A/A noise {kernels['noise_percent']:.1f} %. The map of all {heads:,} heads at this size (two steps, "
        f"{taken['queries_per_frame']} queries a latent frame) took {taken['map_s']:.0f} s with the forwards; the GPU's "
        f"peak was {peak:.1f} GiB, {before:.1f} of them there before."
    )
    return (
        markdown(["self-attention of A14B at 720p", "time", "TFLOP/s", "speed-up", "pairs kept"], rows) + note
    )


def memory() -> str:
    """What the peak is made of."""
    from wanlab import diagnose, plots

    found = {title: diagnose.memory_account(_trace(name)) for title, name in list(TRACES.items())[:2]}
    rows = [
        [name, *(f"{account.size_bytes(part) / 2**30:.2f} GiB" for account in found.values())]
        for part, name in plots.PART_NAMES.items()
    ]
    rows.append(["together", *(f"{account.peak_bytes / 2**30:.2f} GiB" for account in found.values())])
    first = [account.blocks["component"].value_counts().idxmax() for account in found.values()]
    rows.append(["most blocks alive are of", *(plots.NAMES[name] for name in first)])
    return markdown(["at the peak", *found], rows)


def memory_options() -> str:
    record = read("memory_options_h200")
    rows = []
    for model, table in record["options"].items():
        base = next(row for row in table if row["option"] == "untouched")
        rows.append([model, "untouched", f"{base['peak_gib']:.1f} GiB", "", "", ""])
        for row in table:
            if row["state"] == "measured":
                psnr = (
                    "same" if row["psnr_db"] is None or row["psnr_db"] > 200 else f"{row['psnr_db']:.0f} dB"
                )
                saved = f"{row['saved_gib']:.2f} GiB" if row["saves"] else "nothing"
                cost = f"{row['time_ratio']:.2f}x"
                rows.append(["", row["option"], f"{row['peak_gib']:.1f} GiB", saved, cost, psnr])
    sizes = "; ".join(
        f"{model} {s['height']}x{s['width']}x{s['frames']}"
        for model, s in record["settings"].items()
        if isinstance(s, dict)
    )
    note = f"\n\n{machine(record['environment'])}; {sizes}; BF16, random weights, 2 steps, no guidance."
    return markdown(["model", "option", "allocated at the peak", "saves", "time", "video"], rows) + note


def reading() -> str:
    record = read("trace_reading_cpu")
    rows = []
    for name, taken in record["readers"].items():
        best = min(row["seconds"] for row in taken)
        rows.append([name, f"{best:.1f} s", f"{max(row['peak_gib'] for row in taken):.2f} GiB"])
    ratio = min(r["seconds"] for r in record["readers"]["HTA, kernel breakdown"]) / min(
        r["seconds"] for r in record["readers"]["wanlab, kernel times"]
    )
    note = f"\n\n{machine(record['environment'])}; {record['events']:,} events; for what both do {ratio:.1f}x as fast."
    return markdown(["a trace of a million events", "time", "peak memory"], rows) + note


def explorer_speed() -> str:
    record = read("explore_cpu")
    found, most = record["figures"], record["limits"]
    events, few = f"{record['events']:,} events", f"{record['report_events']:,} events"
    opened = f"{found['open_ms'] / 1e3:.1f} s, median of {len(record['rounds'])} times"
    moved, chosen = (f"{found[name]:.0f} ms" for name in ("frame_p95_ms", "select_ms"))
    rows = [
        [f"open the report, {events}", opened, f"{most['open_ms'] / 1e3:g} s"],
        ["a frame while it moves and zooms", f"{moved}, 95th percentile", f"{most['frame_p95_ms']} ms"],
        ["from a selection to all that follows it", f"{chosen}, longest", f"{most['select_ms']} ms"],
        [f"size of a report, {few}", f"{found['report_mb']:.1f} MB", f"{most['report_mb']} MB"],
        ["size of the report of the I2V-A14B trace", f"{found['real_report_mb']:.1f} MB", ""],
    ]  # fmt: skip
    others = record["others_percent"]
    load = f"; other processes used {others:.0f} % of the processors" if others >= 5 else ""
    note = f"\n\nHeadless Chromium, synthetic trace, `benchmarks/explorer_speed.py`; {machine(record['environment'])}{load}."
    return markdown(["live view", "measured", "at most wanted"], rows) + note


def ranges() -> str:
    record = read("range_cost_cpu")
    low, high = record["cost_percent_interval"]
    row = [
        f"{record['ranges']}",
        f"{record['cost_percent']:+.2f} %",
        f"{low:+.1f} to {high:+.1f} %",
        f"{record['control_percent']:+.2f} %",
    ]
    note = f"\n\n{machine(record['environment'])}; {record['settings']['forwards']} forwards each."
    return (
        markdown(
            ["ranges, no profiler running", "an expert's forward", "95 % interval", "A/A control"], [row]
        )
        + note
    )


def captures() -> str:
    """How large a trace at true size is."""
    rows = []
    for title, name in TRACES.items():
        trace = _trace(name)
        size = f"{trace.path.stat().st_size / 1e6:.1f} MB"
        rows.append([title, f"{len(trace.events):,}", f"{len(trace.memory):,}", size])
    return markdown(["2 steps, trimmed and compressed", "events", "allocations and releases", "size"], rows)


TABLES = {
    "breakdown": breakdown, "explore": explore, "explorer_speed": explorer_speed,
    "switch": switch, "attention": attention, "memory": memory, "memory_options": memory_options,
    "ranges": ranges, "captures": captures, "reading": reading,
}  # fmt: skip
