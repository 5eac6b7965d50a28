"""One expert at true size by several plans: time, memory, distance, kernels, beside what the plans could save at most.

    python benchmarks/precision_speed.py --model wan2.2-ti2v-5b --component expert --height 704 --width 1280 --frames 121
    python benchmarks/precision_speed.py --model wan2.2-i2v-a14b --component expert_high --height 720 --width 1280 \
        --frames 81 --iterations 1 --plan recipes/chosen.yaml

Weights are random from one seed. The expert stays loaded as it is; a variant shares with it what its plan leaves alone,
and is freed before the next. A variant is `PLAN:MODE`: PLAN is `as-loaded`, a preset's name, or `plan` (each file of
`--plan`), MODE is `eager` or `compiled` (each block); `:dynamic` behind it scales every input by itself, where otherwise
ranges come from one forward. Each is timed against itself (A/A) and then profiled once. The bound is Amdahl's: the share of
linear layers in the profile of the compiled network, and every planned product timed alone in both formats at its shape.
The record is written after every variant, and `--resume` goes on with one that is there. One bf16 product, timed after each
variant, tells whether the GPU keeps its pace: a variant is held against the baseline only where both were measured at the
same. Where 8-bit products are simulated, as on a CPU, times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import time
from pathlib import Path

from profiled import longest, profiled

VARIANTS = (
    "as-loaded:eager",
    "as-loaded:compiled",
    "uniform-fp8:compiled",
    "uniform-fp8:eager",
    "ffn-fp8:compiled",
    "uniform-int8:compiled",
)
KERNELS_KEPT = 40
PACE_PERCENT = 5.0


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    import pandas as pd
    import torch

    from wanlab import measure
    from wanlab.core.errors import WanlabError
    from wanlab.core.files import write_json
    from wanlab.export.components import component_spec

    torch._dynamo.config.recompile_limit = 64  # every kind of block of a plan is a version of its own
    begin = time.perf_counter()
    model = load(arguments)
    plan = component_spec(model, arguments.component)
    inputs = plan.inputs_for(shape(arguments), torch.Generator().manual_seed(arguments.seed))
    seen, reference = observe(plan.network, lambda: plan.reference(*inputs))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "resume")}
    settings["plan"] = [Path(file).name for file in arguments.plan]
    record = earlier(arguments, settings) or {
        "settings": settings,
        "load_ms": (time.perf_counter() - begin) * 1e3,
        "environment": measure.environment(arguments.device),
        "products": products(seen, arguments),
        "variants": {},
    }
    write_json(arguments.output, record)
    for label, asked, mode, dynamic in variants(arguments):
        if any(
            f"{name} ".startswith(f"{label} ") and "failed" not in row
            for name, row in record["variants"].items()
        ):
            continue
        torch._dynamo.reset()
        gc.collect()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
        try:
            rows = variant(arguments, model, inputs, seen, reference, asked, mode, dynamic)
        except (WanlabError, torch.cuda.OutOfMemoryError) as error:
            rows = {"": {"failed": str(error).splitlines()[0]}}
        for steps, row in rows.items():
            record["variants"][label + steps] = row
        held_against(record)
        for steps, row in rows.items():
            print(f"{label}{steps}: {said(row)}", flush=True)
        write_json(arguments.output, record)
    rows = [
        {
            "variant": name,
            "median_ms": row["samples"]["median_ms"],
            "noise_percent": row["noise_percent"],
            "speedup": row.get("gain", {}).get("speedup"),
            "bound": row.get("bound", {}).get("speedup"),
            "component_gib": row["component_gib"],
            "peak_gib": row["peak_gib"],
            "relative_l2": row["distance"]["relative_l2"],
        }
        for name, row in record["variants"].items()
        if "failed" not in row
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    print(arguments.output)
    return 1 if any("failed" in row for row in record["variants"].values()) else 0


def earlier(arguments, settings: dict) -> dict | None:
    """What an earlier run with the same settings has left, where it is asked for."""
    if not arguments.resume or not arguments.output.is_file():
        return None
    record = json.loads(arguments.output.read_text())
    return record if record["settings"] == json.loads(json.dumps(settings)) else None


def variants(arguments):
    """Label, plan (None is the network as loaded), mode and whether inputs scale themselves, of each variant."""
    from wanlab import precision
    from wanlab.core.errors import WanlabError

    given = list(arguments.variants)
    if arguments.plan and not any(text.startswith("plan:") for text in given):
        given.append("plan:compiled")
    for text in given:
        name, mode, *more = text.split(":")
        if mode not in ("eager", "compiled") or more not in ([], ["dynamic"]):
            raise WanlabError(
                f"{text!r} is no variant; write PLAN:eager or PLAN:compiled, and :dynamic if wanted"
            )
        files = arguments.plan if name == "plan" else [name]
        for file in files:
            plan = None if name == "as-loaded" else only(precision.load_plan(file), arguments.component)
            label = text if name != "plan" else ":".join((plan.name, mode, *more))
            yield label, plan, mode, bool(more)


def only(plan, component: str):
    """A plan's rules for one expert, as the other is not loaded."""
    from msgspec.structs import replace

    return replace(plan, rules=tuple(r for r in plan.rules if fnmatch.fnmatchcase(component, r.component)))


def observe(network, run) -> tuple[dict, object]:
    """Layer -> rows of its input, its largest magnitude and its weight's shape, in one forward; and the output."""
    import torch

    found: dict[str, dict] = {}
    handles = []
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, module in network.named_modules():
        if isinstance(module, kinds):

            def note(module, args, name=name):
                rows = args[0].numel() // args[0].shape[-1] if isinstance(module, torch.nn.Linear) else 0
                found[name] = {
                    "rows": rows,
                    "amax": args[0].abs().amax(),
                    "shape": tuple(module.weight.shape),
                    "dtype": module.weight.dtype,
                }

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        output = run()
    for handle in handles:
        handle.remove()
    for row in found.values():
        row["amax"] = float(row["amax"])
    return found, output


def products(seen: dict, arguments) -> list[dict]:
    """Every distinct shape of a linear layer, its product timed alone in its own dtype and on codes."""
    import torch

    from wanlab import measure
    from wanlab.precision.formats import get_format
    from wanlab.precision.quant_linear import DECODED, SIMULATED, kernel_for, scaled_mm

    device = torch.device(arguments.device)
    shapes: dict[tuple, list[str]] = {}
    for layer, row in seen.items():
        if row["rows"]:
            shapes.setdefault((row["rows"], *row["shape"], row["dtype"]), []).append(layer)

    def timed(call) -> float:
        return measure.time_ms(call, warmup=2, iterations=5, device=arguments.device, progress=False).median

    made = []
    for (rows, outputs, size, dtype), layers in shapes.items():
        row = {"rows": rows, "inputs": size, "outputs": outputs, "dtype": str(dtype), "layers": layers}
        row["time_ms"] = {}
        values = torch.randn(rows, size, device=device, dtype=dtype)
        weight = torch.randn(outputs, size, device=device, dtype=dtype)
        with torch.no_grad():
            row["time_ms"]["as-loaded"] = timed(lambda a=values, b=weight: torch.nn.functional.linear(a, b))
            for format in ("fp8", "fp8-channel", "int8"):
                asked = get_format(format)
                kernel = kernel_for(asked, (outputs, size), device, device.type == "cuda")
                if kernel in (DECODED, SIMULATED) or (format == "int8" and rows < 17):
                    continue
                if format == "int8":
                    codes, held = values.to(torch.int8), weight.to(torch.int8)
                    row["time_ms"][format] = timed(lambda a=codes, b=held: torch._int_mm(a, b.t()))
                    continue
                codes, held = values.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
                scales = [torch.ones((), device=device), torch.ones((), device=device)]
                if format == "fp8-channel":
                    scales = [torch.ones(rows, 1, device=device), torch.ones(outputs, device=device)]
                row["time_ms"][format] = timed(
                    lambda a=codes, b=held, s=scales, kind=dtype: scaled_mm(a, s[0], b, s[1], None, kind)
                )
        flop = 2 * rows * size * outputs
        row["tflops"] = {name: flop / value / 1e9 for name, value in row["time_ms"].items() if value > 0}
        made.append(row)
    return made


def variant(arguments, model, inputs, seen, reference, plan, mode: str, dynamic: bool) -> dict[str, dict]:
    """Build one variant and measure it, once per range of steps; "" where nothing changes with the step."""
    import copy

    from wanlab import precision
    from wanlab.core.errors import WanlabError
    from wanlab.export.components import component_spec

    component = arguments.component
    begin, facts, applied = time.perf_counter(), {}, None
    if plan is None:
        network = model.component(component)
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        network = copy.deepcopy(network, shared)  # compiling marks a module
    else:
        ranges = None if dynamic else {component: {layer: row["amax"] for layer, row in seen.items()}}
        applied = precision.apply_plan(model, plan, ranges)
        network = applied.model.component(component)
        facts = {"kernels_said": applied.kernels, "plan": plan.to_dict(), "plan_hash": plan.hash}
        try:
            effect = precision.effect_check(model, applied)
            facts |= {"effect": effect.verdict, "formats": effect.frame.to_dict("records")}
        except WanlabError as error:
            facts["no_effect"] = str(error)
    facts["build_ms"] = (time.perf_counter() - begin) * 1e3
    facts["component_gib"] = held_bytes(network) / 2**30
    if mode == "compiled":
        for block in network.blocks:
            block.compile()
    call = component_spec(model, component, network=network).reference
    if applied is None or applied.clock is None:
        return {
            "": facts | measured(arguments, lambda: call(*inputs), reference) | planned(applied, component)
        }
    rows = {}
    for first, last in applied.clock.bands:
        with applied.at(first):
            found = measured(arguments, lambda: call(*inputs), reference)
        rows[f" steps {first}-{last}"] = facts | found | planned(applied, component, first)
    return rows


def planned(applied, component: str, step: int | None = None) -> dict:
    """Layer -> format it multiplies codes in."""
    if applied is None:
        return {}
    rows = applied.frame[applied.frame["component"] == component]
    if step is not None:
        rows = rows[rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))]
    rows = rows[rows["kernel"].isin(("scaled_mm", "int_mm"))]
    return {"products_on_codes": dict(zip(rows["layer"], rows["format"], strict=True))}


def measured(arguments, run, reference) -> dict:
    """Time, memory and distance of one forward, and its kernels."""
    import torch

    from wanlab import measure
    from wanlab.engines.parity import differences
    from wanlab.measure import timing

    on_gpu = arguments.device.startswith("cuda")
    with torch.no_grad():
        begin = time.perf_counter()
        output = run()
        timing.synchronise(arguments.device)
        first_ms = (time.perf_counter() - begin) * 1e3
        distance = differences(reference, output)
        del output
        before = 0
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        control = measure.aa_control(
            run, warmup=0, iterations=arguments.iterations, device=arguments.device, progress=False
        )
        added = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
        both = (*control.first.values_ms, *control.second.values_ms)
        samples = measure.Samples("forward", both, control.first.device, control.first.clock)
        pace_ms = pace(arguments)  # at once, while the GPU is as warm as it was
        return {
            "pace_ms": pace_ms,
            "samples": samples.to_dict(),
            "noise_percent": control.noise_percent,
            "first_call_ms": first_ms,
            "forward_gib": added,
            "distance": distance,
            "kernels": kernels(run, on_gpu),
        }


def pace(arguments) -> float:
    """Median time of one large product, always the same, once the clocks, which what ran before has set, settle on it."""
    import torch

    from wanlab import measure

    on_gpu = arguments.device.startswith("cuda")
    side, warmup = (8192, 200) if on_gpu else (256, 2)
    generator = torch.Generator(arguments.device).manual_seed(0)
    one = torch.randn(side, side, device=arguments.device, dtype=torch.bfloat16, generator=generator)
    return measure.time_ms(
        lambda: one @ one, warmup=warmup, iterations=50, device=arguments.device, progress=False
    ).median


def kernels(run, on_gpu: bool) -> list[dict]:
    """Kernels of one forward (operators on the CPU) by name and kind, longest first, with their share of the time of all."""
    from wanlab.diagnose import operators

    rows = profiled(run, on_gpu=on_gpu)
    total = sum(row["time_ms"] for row in rows) or 1.0
    for row in rows:
        row["kind"] = operators.kind(row["name"])
        row["share_percent"] = 100 * row["time_ms"] / total
    return longest(rows, KERNELS_KEPT)


def held_against(record: dict) -> None:
    """Gains over the compiled network as loaded, its Amdahl bounds, and peaks; over again with every variant."""
    from wanlab.diagnose import operators
    from wanlab.measure import Samples, compare

    done = {name: row for name, row in record["variants"].items() if "failed" not in row}
    for row in done.values():
        row["peak_gib"] = None if row["forward_gib"] is None else row["component_gib"] + row["forward_gib"]
    base = done.get("as-loaded:compiled") or done.get("as-loaded:eager")
    if base is None:
        return
    first = Samples.from_dict(base["samples"])
    linear = sum(row["share_percent"] for row in base["kernels"] if row["kind"] == operators.LINEAR) / 100
    base["linear_share_percent"] = 100 * linear
    times = {layer: row["time_ms"] for row in record["products"] for layer in row["layers"]}
    before = sum(each["as-loaded"] for each in times.values())
    record["linear_alone_ms"] = before
    for row in done.values():
        if row is base:
            continue
        change_percent = 100 * (row["pace_ms"] / base["pace_ms"] - 1)
        if abs(change_percent) > PACE_PERCENT:
            row["not_compared"] = f"the device ran {change_percent:+.0f} % off the pace of the baseline"
            continue
        noise = max(base["noise_percent"], row["noise_percent"])
        row["gain"] = compare(first, Samples.from_dict(row["samples"]), noise).row()
        formats = row.get("products_on_codes", {})
        saved = sum(times[layer]["as-loaded"] - times[layer].get(format, times[layer]["as-loaded"])
                    for layer, format in formats.items() if layer in times)  # fmt: skip
        if formats and before:
            rest = 1 - linear * saved / before
            on = sum(times[layer]["as-loaded"] for layer in formats if layer in times)
            row["bound"] = {
                "speedup": 1 / rest,
                "time_ms": first.median * rest,
                "linear_share_percent": 100 * linear,
                "of_it_planned_percent": 100 * on / before,
                "product_speedup": on / (on - saved) if on > saved else None,
            }


def held_bytes(network) -> int:
    """Of the distinct tensors of a network."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensors.values())


def said(row: dict) -> str:
    from wanlab.diagnose import operators

    if "failed" in row:
        return f"failed: {row['failed']}"
    text = f"{row['samples']['median_ms']:,.1f} ms, weights {row['component_gib']:.2f} GiB"
    text += (
        f", first call {row['first_call_ms'] / 1e3:.1f} s, relative L2 {row['distance']['relative_l2']:.4f}"
    )
    kernel = next((one["name"] for one in row["kernels"] if one["kind"] == operators.LINEAR), "")
    if "not_compared" in row:
        text += f", NOT COMPARED: {row['not_compared']}"
    return f"{text}, {kernel[:80]}" + (f"; NO EFFECT: {row['no_effect']}" if "no_effect" in row else "")


def load(arguments):
    from wanlab import models

    return models.load(
        arguments.model,
        weights=arguments.weights,
        seed=arguments.seed,
        components=[arguments.component],
        device=arguments.device,
        dtype=arguments.dtype,
    )


def shape(arguments):
    from wanlab import export, models

    tokens = models.get(arguments.model).defaults.text_tokens
    return export.ClipShape(1, arguments.height, arguments.width, arguments.frames, tokens)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--weights", default="random", choices=("random", "pretrained"))
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=192, help="pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="PLAN:MODE")
    parser.add_argument("--plan", nargs="+", default=[], help="plan files, for `plan:MODE`")
    parser.add_argument("--iterations", type=int, default=2, help="samples of each half of the A/A control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("precision_speed.json"))
    parser.add_argument("--resume", action="store_true", help="measure what the output does not hold yet")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
