"""Tables of the conversion: ONNX at true size, forms, engines, from the JSON under data/results/."""

from __future__ import annotations

import re

from new_records import engines_record, tvm_record
from table_text import machine, markdown, read

from wanlab.core.stats import ends_text

GIB = 2**30

KERNELS = {
    "attention": r"flash|sdpa|fmha|mha",
    "matrix products": r"nvjet|gemm|cutlass",
    "norms": r"layer_?norm|rms_?norm|LayerNorm",
    "rotary embedding": r"RotaryEmbedding",
    "activation": r"[Gg]elu|silu",
}
OF_KINDS = {"linear": "matrix products", "attention": "attention"}
"""Kinds of kernels of 42_component -> rows of the table; the others are not told apart there."""


def onnx_export() -> str:
    """An A14B expert as ONNX: seconds, bytes, host memory."""
    record = read("onnx_export_h200")
    rows = [
        [
            row["graph"],
            f"{row['time_ms'] / 1e3:.0f} s",
            f"{row['size_bytes'] / GIB:.2f} GiB",
            f"{row['weights_written_bytes'] / GIB:.2f} GiB",
            f"{row['peak_host_gib']:.2f} GiB",
            f"{row['peak_over_weights']:.2f}",
            f"{row['nodes_before']:,} to {row['nodes_after']:,}",
        ]
        for row in record["exports"]
    ]
    header = ["graph", "time", "size", "written", "host peak", "over the weights", "nodes"]
    return markdown(header, rows) + (
        f"\n\nExpert of I2V-A14B, {record['weights_gib']:.2f} GiB of weights in bfloat16 on the host; opset"
        f" {record['exports'][0]['opset']}, every size free; {machine(record['environment'])}, 16 cores."
    )


def onnx_blocks() -> str:
    """Parity of its blocks with float32 arithmetic, beside PyTorch's own in bfloat16."""
    record = read("onnx_export_h200")
    blocks = [row for row in record["blocks"] if row["piece"].startswith("blocks.")]
    ends = {row["piece"]: row for row in record["blocks"]}
    figures = {
        "ONNX Runtime, one block": [row["relative_l2"] for row in blocks],
        "PyTorch eager, the same block": [row["eager_relative_l2"] for row in blocks],
        "ONNX Runtime over PyTorch": [row["relative_l2"] / row["eager_relative_l2"] for row in blocks],
    }
    rows = [
        [name, *(f"{value:.3g}" for value in (min(found), sorted(found)[len(found) // 2], max(found)))]
        for name, found in figures.items()
    ]
    note = (
        f"\n\nRelative L2 to the same block in float32, over {len(blocks)} blocks at 7,800 tokens. Rounding the input"
        f" to bfloat16 alone costs {ends['before']['relative_l2']:.2g}; what comes after the blocks is off by"
        f" {ends['after']['relative_l2']:.2g}. {machine(record['environment'])}."
    )
    return markdown(["relative L2 to float32", "least", "median", "most"], rows) + note


def onnx_forms() -> str:
    """The same expert traced as it is, in friendly forms, with fused operators."""
    rows, places = [], []
    for name in ("onnx_forms_cpu", "onnx_forms_h200"):
        record = read(name)
        gpu = record["environment"].get("gpu")
        place = gpu["name"] if gpu else "CPU"
        places.append(machine(record["environment"]))
        for row in record["forms"]:
            # Eager has no nodes: JSON has no NaN, so it says so in words.
            counts = [
                row[key] for key in ("nodes", "ScatterND", "ReduceMean", "RMSNormalization", "Attention")
            ]
            cells = ["" if count is None or isinstance(count, str) else f"{count:.0f}" for count in counts]
            sign = "" if row["verdict"] == "baseline" else row["verdict"]
            cells = [f"{place}, {row['dtype']}", row["form"], *cells]
            rows.append([*cells, f"{row['time_ms']:.2f} ms", f"{row['ratio']:.2f}x", sign])
    header = ["where", "form", "nodes", "ScatterND", "RMSNorm as a chain", "as an operator", "Attention"]
    note = "wan-nano's expert_high, one clip; a chain is counted by its ReduceMean"
    return markdown([*header, "time", "ratio", ""], rows) + f"\n\n{note}. {'; '.join(places)}."


def engines() -> str:
    """TI2V-5B at true size on every engine: time, memory, distance."""
    rows, notes, environment = [], [], None
    for name in ("engines_dit_h200", "engines_vae_h200"):
        try:
            record = read(name, engines_record)
        except FileNotFoundError:
            continue
        settings, environment = record["settings"], record["environment"]
        size = f"{settings['height']}x{settings['width']}x{settings['frames']}"
        for engine, row in record["engines"].items():
            what = f"{settings['component']}, {size}"
            if "failed" in row:
                rows.append([what, engine, row["failed"], "", "", "", ""])
                continue
            first = next(iter(record["engines"].values()))
            ratio = first["samples"]["median_ms"] / row["samples"]["median_ms"]
            distance = row.get("distance")
            notes += [f" {settings['component']}, {engine}: {row['note']}."] if row.get("note") else []
            rows.append(
                [
                    what,
                    engine,
                    f"{row['samples']['median_ms']:,.0f} ms",
                    "" if row["noise_percent"] is None else f"{row['noise_percent']:.1f} %",
                    "1" if row is first else f"{ratio:.2f}x",
                    f"{row['peak_gib']:.1f} GiB",
                    "" if row is first or distance is None else f"{distance['relative_l2']:.2g}",
                ]
            )
    header = [
        "TI2V-5B",
        "engine",
        "median",
        "A/A noise",
        "against eager",
        "peak of the device",
        "relative L2",
    ]
    note = f"\n\n{machine(environment)}; bfloat16, random weights, batch 1.{''.join(notes)}"
    return markdown(header, rows) + note


def vae_memory() -> str:
    """What ONNX Runtime holds while it decodes chunk by chunk, by how its sessions are opened."""
    record = read("vae_memory_h200")
    ways = {
        "today": "a planned block (memory pattern), as it comes",
        "no_pattern": "**no planned block**: how `streamed_vae` opens its sessions",
        "shared.no_pattern": "no planned block, one arena for both sessions",
        "torch.no_pattern": "no planned block, PyTorch's allocator",
        "workspace0": "as it comes, small cuDNN workspace",
        "power_of_two": "as it comes, arena grows by powers of two",
        "shrink_all.no_pattern": "no planned block, arena shrunk after every chunk",
    }
    rows = []
    for name, what in ways.items():
        row = next(row for row in record["sets"] if row["set"] == name)
        chunks = [stage["device_gib"] for stage in row["stages"] if "chunk" in stage["stage"]]
        held = " / ".join(f"{gib:.1f}" for gib in chunks[:3])
        rows.append([what, f"{row['median_ms']:,.0f} ms", held, f"{row['peak_gib']:.1f} GiB"])
    header = ["sessions", "time", "held after chunk 1 / 2 / 3, GiB", "peak of the device"]
    settings = record["settings"]
    return markdown(header, rows) + (
        f"\n\nTI2V-5B's VAE decoder, {settings['height']}x{settings['width']}x41, {settings['dtype']}, random weights; "
        f"{machine(record['environment'])}. Live at the peak, as PyTorch's allocator counts it: "
        f"{record['live_peak_gib']:.1f} GiB."
    )


def kernels() -> str:
    """Where each engine's time goes, by kernel."""
    record = read("engines_dit_h200", engines_record)
    found = {name: _by_kind(row["kernels"]) for name, row in record["engines"].items() if "kernels" in row}
    kinds = [*KERNELS, "elementwise, casts, copies"]
    rows = [[kind, *(f"{times.get(kind, 0.0):,.0f} ms" for times in found.values())] for kind in kinds]
    rows.append(["all kernels", *(f"{sum(times.values()):,.0f} ms" for times in found.values())])
    return markdown(["kernels of the DiT", *found], rows)


def _by_kind(listed: list[dict]) -> dict[str, float]:
    times: dict[str, float] = {}
    for row in listed:
        known = OF_KINDS.get(row.get("kind"))
        kind = known or next(
            (k for k, p in KERNELS.items() if re.search(p, row["name"])), "elementwise, casts, copies"
        )
        times[kind] = times.get(kind, 0.0) + row["time_ms"]
    return times


REFUSED = {
    r"fell back to the CPU": "a node falls back to the CPU",
    r"graph capture feature": "not every node is on the GPU",
    r"Provider type for (\w+) node": "no kernel for {} in bfloat16",
}
"""What ONNX Runtime's refusals come to."""
CODES = r"qqtst|s8|i8|e4m3|int8_gemm"
"""In the name of a kernel that multiplies codes."""


def expert_engines() -> str:
    """wan-nano's expert on every engine, and by graphs in 8 and 4 bits."""
    cells: dict[str, dict[str, str]] = {}
    off: dict[str, str] = {}
    places, notes, on_codes = [], [], []
    for name in ("expert_engines_h200", "expert_engines_cpu"):
        record = read(name, engines_record)
        engines = record["engines"]
        engines = list(engines.values()) if isinstance(engines, dict) else engines
        gpu = record["environment"].get("gpu")
        notes.append(machine(record["environment"]))
        for row in engines:
            place = f"{gpu['name'] if gpu else 'CPU'}, {row['dtype']}"
            if place not in places:
                places.append(place)
                noise = next(r["noise_percent"] for r in engines if r["dtype"] == row["dtype"])
                notes.append(f"A/A noise {noise:.0f} % ({row['dtype']})")
            line = cells.setdefault(row["engine"], {})
            if "failed" in row:
                line[place] = "refused: " + next(
                    said.format(*found.groups())
                    for pattern, said in REFUSED.items()
                    if (found := re.search(pattern, row["failed"]))
                )
                continue
            off.setdefault(row["engine"], f"{row['relative_l2']:.1g}" if row["relative_l2"] else "")
            ratio = f", {row['speedup']:.2f}x" if "speedup" in row else ""
            ratio += (
                f" ({row['verdict']})" if row.get("verdict", "faster") not in ("faster", "slower") else ""
            )
            line[place] = f"{row['time_ms']:.2f} ms{ratio}"
            if any(re.search(CODES, kernel["name"]) for kernel in row["kernels"]):
                on_codes.append(row["engine"])
    rows = [
        [engine, *(line.get(place, "") for place in places), off.get(engine, "")]
        for engine, line in cells.items()
    ]
    header = ["wan-nano expert_high", *places, "relative L2, float32"]
    products = (
        f"products of codes in {', '.join(on_codes)}"
        if on_codes
        else "no product of codes among its longest kernels"
    )
    return markdown(header, rows) + (
        f"\n\nOne clip, inputs and outputs on the device; ratios against eager. On the H200, {products}."
        f" {'; '.join(notes)}. The other GPU of its host was at work, on which eager launches depend."
    )


def bench() -> str:
    """`wanlab bench` of the DiT on ONNX Runtime, over PyCUDA memory."""
    record = read("bench_5b_h200")
    keys = ("min_ms", "median_ms", "mean_ms", "p99_ms", "max_ms", "cv_percent")
    rows = [
        [name, *(f"{record['samples'][name][key]:,.4g}" for key in keys)]
        for name in ("latency", "h2d", "device", "d2h", "enqueue")
    ]
    note = (
        f"\n\nTI2V-5B DiT 704x1280x121, {record['engine']}, buffers of {record['settings']['buffers']},"
        f" {record['samples']['device']['n']} iterations, A/A noise {record['noise_percent']:.2f} %. Device time by"
        f" PyTorch's events on its own stream and memory over this one: {record['events_ratio']:.4f}."
        f" {machine(record['environment'])}."
    )
    return markdown(["measure, ms", "min", "median", "mean", "p99", "max", "CV %"], rows) + note


def tvm() -> str:
    """TVM beside ONNX Runtime and eager on the CPU."""
    record = read("tvm_cpu", tvm_record)
    gains = {row["candidate"]: row for row in record["comparisons"] if row["baseline"] == "eager"}
    builds = {row["build"]: row["build_ms"] for row in record["builds"]}
    off = {row["engine"]: row["relative_l2"] for row in record["parity"] if row["against"] == "eager"}
    rows = []
    for name, samples in record["samples"].items():
        gain = gains.get(name)
        rows.append(
            [
                name,
                f"{samples['median_ms']:,.1f} ms",
                f"{gain['speedup']:.2f}x ({ends_text(gain['low'], gain['high'])})" if gain else "1",
                gain["verdict"] if gain else "",
                f"{builds[name] / 1e3:.1f} s" if name in builds else "",
                f"{off[name]:.1g}" if name in off else "",
            ]
        )
    header = ["wan-nano expert_high", "median", "against eager", "", "build", "relative L2"]
    note = f"\n\n{machine(record['environment'])}; A/A noise {record['noise_percent']:.1f} %."
    return markdown(header, rows) + note


def tensorrt() -> str:
    """What TensorRT for RTX built without a GPU, and what it refused."""
    record = read("tensorrt_builds_cpu")
    refused: dict[tuple, dict[str, list[str]]] = {}
    for row in record["refused"]:
        at = f"{row['node'].partition('/')[0]}: " if row["node"] else ""
        reasons = refused.setdefault((row["component"], row["numbers"]), {})
        reasons.setdefault(f"{at}{row['reason']}", []).append(row["capability"])
    rows = []
    for built in record["builds"]:
        known = refused.get((built["component"], built["numbers"]), {})
        rows.append(
            [
                built["component"],
                built["numbers"],
                ", ".join(built["compute_capabilities"]),
                ", ".join(f"{count} {kind}" for kind, count in built["datatypes"].items()),
                f"{built['size_bytes'] / 2**20:.1f} MiB",
                f"{built['time_ms'] / 1e3:.0f} s",
                "; ".join(f"{', '.join(targets)}: {reason}" for reason, targets in known.items()),
            ]
        )
    header = ["wan-nano", "graph", "built for SM", "layers by what they read", "engine", "build", "refused"]
    environment = record["environment"]
    note = (
        f"\n\n{record['runtime']}; {machine(environment)}, load {record['load']:.0f} on"
        f" {environment['cores_available']} cores when it began. Nothing was executed."
    )
    return markdown(header, rows) + note


TABLES = {
    "onnx_export": onnx_export,
    "onnx_blocks": onnx_blocks,
    "onnx_forms": onnx_forms,
    "engines": engines,
    "kernels": kernels,
    "vae_memory": vae_memory,
    "expert_engines": expert_engines,
    "bench": bench,
    "tensorrt": tensorrt,
    "tvm": tvm,
}
