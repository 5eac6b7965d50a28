"""Tables of sweeps: how fast they are run, and what the recorded ones say."""

from __future__ import annotations

import json

from table_text import ROOT, machine, markdown, read

PRECISION = ROOT / "data" / "sweeps" / "wan-nano-precision"


def sweep_speed() -> str:
    record = read("sweep_speed_cpu")
    short, long, asked = record["short"], record["long"], record["settings"]
    before, after = min(short["papermill_s"]), short["sweep_s"]
    rows = [
        [
            f"{asked['runs']} short runs",
            f"{before:,.1f} s, one after the other",
            f"{after:,.1f} s, {asked['slots']} at a time",
            f"{after / before:.2f}x",
            f"{100 * (short['control_ratio'] - 1):.1f} %",
            f"{short['bound_s']:,.1f} s",
        ],
        [
            "one run of a minute",
            f"{min(long['papermill_s']):,.1f} s",
            f"{long['wanlab_s']:,.1f} s",
            f"{1 + long['overhead_percent'] / 100:.3f}x",
            f"{long['control_percent']:.1f} %",
            f"{long['bound_s']:,.1f} s",
        ],
    ]
    header = ["what", "papermill", "wanlab", "time", "A/A noise of papermill", "cells alone"]
    note = f"\n\n{machine(record['environment'])}; `benchmarks/sweep_speed.py`. Reports and the page are in wanlab's time."
    return markdown(header, rows) + note


def sweep_precision() -> str:
    from wanlab.plots import label
    from wanlab.runs import choose, compare, readable

    found = compare(PRECISION)
    shown = readable(found, apart=True).rename(columns=label)
    first = found.baseline
    environment = json.loads((first.folder / "run.json").read_text())["environment"]
    note = (
        f"{machine(environment)}; wan-nano, `wanlab sweep recipes/sweeps/wan-nano-precision.yaml`, every configuration run "
        f"{first.repeats} times, each with the machine alone."
    )
    table = markdown(list(shown.columns), [[str(cell) for cell in row] for row in shown.to_numpy().tolist()])
    choice = choose(found, 3.0)
    return f"{table}\n\n{choice.text} {'; '.join(choice.notes).capitalize()}.\n\n{note}"


TABLES = {"sweep_speed": sweep_speed, "sweep_precision": sweep_precision}
