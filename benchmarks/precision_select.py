"""Plans selected by time from the costs of compiled layers, timed at true size: TI2V-5B and one expert of I2V-A14B.

    python benchmarks/precision_select.py --output data/results --recipes recipes       # on one NVIDIA H200
    python benchmarks/precision_select.py --device cpu --jobs nano --output /tmp/select  # the same way through, no times

Every job, with weights that are random from one seed:
1. `precision.layer_costs` times every shape of a linear layer in every format, by torch.compile as blocks run it.
2. `precision.sensitivity` says how far each layer's rounding moves the latents, on random inputs of a small clip. Random
   weights have no quality to lose: effects only weigh layers against each other.
3. Two plans, one format per projection so that all blocks are one kind: the fastest there is, and the fastest with at most
   half the effect of uniform FP8.
4. `precision_speed.py` times both beside the network as loaded, uniform FP8 and FFN FP8, all compiled: memory, kernels and
   the Amdahl bound with them.
Files appear after every step and are not made again, so a command that was cut off is given once more.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

import precision_speed

JOBS = {
    "ti2v": {"model": "wan2.2-ti2v-5b", "component": "expert", "height": 704, "width": 1280, "frames": 121},
    "a14b": {
        "model": "wan2.2-i2v-a14b",
        "component": "expert_high",
        "height": 720,
        "width": 1280,
        "frames": 81,
    },
    "nano": {"model": "wan-nano", "component": "expert_high", "height": 64, "width": 64, "frames": 5},
}
BESIDE = ("as-loaded:compiled", "uniform-fp8:compiled", "ffn-fp8:compiled", "plan:compiled")
FORMATS = ("fp8", "fp8-channel", "int8")
SMALL = {"height": 256, "width": 448, "frames": 17}
"""Of the clip that sensitivities are measured on; the miniature takes its own size."""
STEPS, CALLS = 8, 2


def main() -> int:
    arguments = parse()
    from wanlab.core.files import write_json

    codes = []
    for name in arguments.jobs:
        job = JOBS[name]
        output = arguments.output / f"precision_selected_{name}.json"
        found = arguments.output / f"precision_selected_{name}_plans.json"
        recipes = arguments.recipes or arguments.output
        selection = kept(output) or kept(found)
        if selection is None:
            selection = select(name, job, recipes, arguments.device)
            write_json(found, {"selection": selection})
        words = [f"--{key}={value}" for key, value in job.items()]
        words += [f"--device={arguments.device}", f"--output={output}", "--resume"]
        words += ["--iterations=2", "--variants", *BESIDE]
        plans = [str(recipes / f"{plan}.yaml") for plan in selection["plans"]]
        codes.append(precision_speed.main([*words, "--plan", *plans]))
        write_json(output, json.loads(output.read_text()) | {"selection": selection})
        found.unlink(missing_ok=True)
    return max(codes)


def kept(path: Path) -> dict | None:
    """What was selected before."""
    return json.loads(path.read_text()).get("selection") if path.is_file() else None


def select(name: str, job: dict, recipes: Path, device: str) -> dict:
    """Costs, effects and the two plans, which are written as YAML."""
    import torch
    from msgspec.structs import replace

    from wanlab import models, precision

    component = job["component"]
    model = models.load(
        job["model"], weights="random", seed=0, components=[component], device=device, dtype="bfloat16"
    )
    size = {key: job[key] for key in ("height", "width", "frames")}
    small = size if name == "nano" else SMALL
    with tempfile.TemporaryDirectory() as folder:
        recording = synthetic(model, component, small, Path(folder))
        ranges = {component: precision.calibrate(model, component, recording)}
        found = precision.sensitivity(model, recording, ranges, formats=FORMATS, calls=CALLS, probes=2)
    found = found.with_bands(1)
    costs = precision.layer_costs(model, FORMATS, **size)
    presets = [precision.load_plan(each) for each in ("uniform-fp8", "ffn-fp8")]
    predicted = precision.predict(model, presets, found, costs, objective="time")
    limit = float(predicted.set_index("plan").loc["uniform-fp8", "effect"]) / 2
    plans, rows = {}, []
    for label, budget in (("fastest", None), ("half-effect", limit)):
        chosen = precision.select_plan(
            found, costs, objective="time", budget=budget, group="projection", name=f"{name}-{label}"
        )
        print(chosen, flush=True)
        if chosen.plan.hash in {plan["hash"] for plan in plans.values()}:
            continue  # the fastest has so small an effect already
        note = f"selected by time for {job['model']} {component} at {size['height']}x{size['width']}x{size['frames']}"
        note += " from costs of compiled layers" if chosen.unit == "ms" else f", {chosen.unit}"
        precision.save_plan(replace(chosen.plan, note=note), recipes / f"{chosen.plan.name}.yaml")
        plans[chosen.plan.name] = chosen.plan.to_dict() | {"hash": chosen.plan.hash}
        rows.append(chosen.row())
    keys = ["projection", "format", "source", "kernel"]
    table = costs.groupby(keys, as_index=False, dropna=False)[["time_ms", "work_gflop"]].sum(min_count=1)
    made = {
        "plans": plans,
        "selected": rows,
        "predicted": predicted.to_dict("records"),
        "effects": found.frame.pivot_table("effect", "projection", "format", "sum")
        .reset_index()
        .to_dict("records"),
        "costs": table.to_dict("records"),
    }
    del model, recording, ranges, found
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return made


def synthetic(model, component: str, size: dict[str, int], folder: Path):
    """A recording of random inputs at some steps of the expert, as there are no generations of random weights to record."""
    import torch

    from wanlab.export import ClipShape
    from wanlab.export.components import component_spec
    from wanlab.precision.recording import RecordedCall, Recording, keep

    plan = component_spec(model, component)
    shape = ClipShape(1, **size, text_tokens=model.spec.defaults.text_tokens)
    schedule = model.schedule(STEPS)
    calls = []
    for row in schedule[schedule["component"] == component].itertuples():
        generator = torch.Generator().manual_seed(int(row.step))
        given = dict(zip(plan.inputs, plan.inputs_for(shape, generator), strict=True))
        given["timestep"] = torch.full_like(given["timestep"], row.timestep)
        tensors = {key: keep(folder, tensor) for key, tensor in given.items()}
        calls.append(
            RecordedCall(0, component, int(row.step), float(row.timestep), float(row.sigma), "cond", tensors)
        )
    settings = size | {"steps": STEPS, "guidance_scale": 1.0}
    return Recording(path=str(folder), model=model.spec.name, settings=settings, calls=tuple(calls))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=["ti2v", "a14b"], choices=list(JOBS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--recipes", type=Path, help="folder of the plans; by default that of the JSON files")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
