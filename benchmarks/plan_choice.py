"""A plan chosen by measurement, beside plans picked by hand: quality and divergence on cases that nothing was chosen by.

    python benchmarks/plan_choice.py --output plan_choice.json --recipe recipes/wan-nano-3-percent.yaml
    python benchmarks/plan_choice.py --device cpu --height 64 --width 96 --frames 9 --steps 4 --cases 4 --final-cases 4 \
        --examples 1 --output /tmp/plan_choice.json

Inputs are recorded on training photographs, ranges and sensitivities measured on them. A few plans of the frontier are
generated on the set `selection`; they tell what effect the quality budget allows. The plan is then the cheapest within it,
with at least `--min-share` of linear weights in 8 bits or fewer and no more bits than `--max-bits`, and its predicted
effect is kept under `--headroom` times that of every plan in `--beat`, so that it is smaller and better than they are. It is
verified, repaired if need be, and reported once on the set `final` beside all presets, case by case. The JSON is written
after every step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

BEAT = (
    "uniform-int8",
    "uniform-fp8",
    "blocks-int8",
    "blocks-fp8",
    "inner-1-int8",
    "inner-1-fp8",
    "ffn-int8",
    "ffn-fp8",
)
BESIDE = ("uniform-fp8-channel", "uniform-int8-weight", "blocks-int4-weight")
SIZE = ("height", "width", "frames", "steps", "guidance_scale")


def main() -> int:
    arguments = parse()
    from wanlab import measure, models, precision
    from wanlab.core.files import write_json
    from wanlab.heldout.cases import load_cases
    from wanlab.precision.plan import LINEAR

    begin = time.perf_counter()
    record = {
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
        },
        "environment": measure.environment(arguments.device),
        "time_ms": {},
    }
    size = {name: getattr(arguments, name) for name in SIZE if getattr(arguments, name) is not None}

    def done(step: str, **facts) -> None:
        nonlocal begin
        record["time_ms"][step] = (time.perf_counter() - begin) * 1e3
        record.update(facts)
        write_json(arguments.output, record)
        print(f"{step}: {record['time_ms'][step] / 1e3:.1f} s", flush=True)
        begin = time.perf_counter()

    model = models.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    done("load", dtype=str(model.dtype).removeprefix("torch."))
    work = arguments.output.parent / f"{arguments.output.stem}-work"
    examples = precision.nano_examples(arguments.examples, seed=arguments.seed)
    recording = precision.record_inputs(model, examples, work / "recording", progress=False, **size)
    ranges = {
        c: precision.calibrate(model, c, recording, layers=LINEAR, progress=False)
        for c in recording.components
    }
    done("record and calibrate")
    found = precision.sensitivity(
        model,
        recording,
        ranges,
        formats=arguments.formats,
        probes=arguments.probes,
        seed=arguments.seed,
        progress=False,
    )
    if not arguments.by_steps:
        found = found.with_bands(
            1
        )  # errors of different steps are not independent: one range says their sum right
    done("sensitivity", sensitivity_cost=found.costs().to_dict("records")[0])
    sizes = {name: size[name] for name in ("height", "width", "frames") if name in size}
    # Presets are predicted with their formats too, and the rest of the layers may be in one that is not chosen from.
    costs = precision.layer_costs(
        model, dict.fromkeys((*arguments.formats, arguments.rest)), progress=False, **sizes
    )
    done("layer costs", costs_source=sorted(set(costs["source"])))

    presets = {name: preset(name) for name in (*arguments.beat, *arguments.beside)}
    predicted = precision.predict(model, presets.values(), found, costs, objective=arguments.objective)
    originals = precision.make_originals(
        model, load_cases("selection", arguments.cases), batch=arguments.batch, progress=False, **size
    )
    done("originals", predicted=predicted.to_dict("records"), floor_effect=originals.floor_effect)
    weakest = predicted[predicted["plan"].isin(arguments.beat)]["effect"].min()
    ceiling = arguments.headroom * float(weakest) if arguments.headroom else None
    chosen = precision.choose_plan(
        model,
        found,
        costs,
        originals,
        limit_percent=arguments.limit_percent,
        ceiling=ceiling,
        probes=arguments.tried,
        calibrations=ranges,
        objective=arguments.objective,
        formats=arguments.formats,
        group=arguments.group,
        by_steps=arguments.by_steps,
        min_share_8bit=arguments.min_share,
        max_bits=arguments.max_bits,
        rest=arguments.rest,
        progress=False,
    )
    spent = precision.search_cost(found, recording, originals, chosen.generations)
    done(
        "choice",
        budget={
            "by_quality": chosen.relation.budget(arguments.limit_percent),
            "ceiling": ceiling,
            "rest_effect": chosen.rest_effect,
        },
        relation=str(chosen.relation),
        frontier=chosen.frontier.frame.to_dict("records"),
        predictions=chosen.predictions().to_dict("records"),
        repairs=chosen.repaired.history.to_dict("records"),
        selected={"plan": chosen.plan.to_dict(), "hash": chosen.plan.hash, **chosen.selection.row()},
        selection_set=chosen.verification.row(),
        search=spent.row() | {"formula": spent.formula},
    )
    print(chosen.selection, "\n", chosen.relation, "\n", spent, sep="")
    if arguments.recipe:
        precision.save_plan(named(chosen, arguments), arguments.recipe)

    final = precision.make_originals(
        model, load_cases("final", arguments.final_cases), batch=arguments.batch, progress=False, **size
    )
    done("final originals", final_floor_effect=final.floor_effect)
    proofs, rows = [], []
    for name, plan in {"selected": chosen.plan, **presets}.items():
        proofs.append(
            precision.verify_plan(
                model,
                plan,
                final,
                calibrations=ranges,
                timed=arguments.timed,
                progress=False,
                seed=arguments.seed,
            )
        )
        rows = precision.compare_plans(proofs, seed=arguments.seed).to_dict("records")
        for row, proof in zip(rows, proofs, strict=True):
            row |= {"kernels": proof.kernels, "effect_check": proof.took_effect}
            row["bits_at_least_selected"] = proof.bits_per_weight >= proofs[0].bits_per_weight - 1e-9
        done(f"final {name}", final=rows, per_case={p.plan.name: p.frame.to_dict("list") for p in proofs})
    verdict = judged(rows, arguments)
    done("verdict", verdict=verdict)
    print(table(rows))
    print("\n".join(verdict["said"]))
    print(arguments.output)
    return 0 if verdict["passed"] else 1


def preset(name: str):
    """A preset; `inner-1-int8` keeps one block at each end, as the miniature has six."""
    from wanlab import precision

    if name.startswith("inner-") and name.split("-")[1].isdigit():
        return precision.inner_blocks(name.split("-", 2)[2], int(name.split("-")[1]))
    return precision.load_plan(name)


def named(chosen, arguments):
    """The plan as a recipe, with where it comes from."""
    from msgspec.structs import replace

    proof = chosen.verification
    note = (
        f"chosen by benchmarks/plan_choice.py for {arguments.model}: least {arguments.objective} with a quality loss of at"
        f" most {arguments.limit_percent:g} %; {proof.bits_per_weight:.2f} bits per linear weight, loss on the selection set"
        f" {proof.quality}"
    )
    name = arguments.recipe.stem
    return replace(chosen.plan, name=name, note=note)


def judged(rows: list[dict], arguments) -> dict:
    """What was asked of the selected plan, each with yes or no."""
    selected, others = rows[0], {row["plan"]: row for row in rows[1:]}
    high = selected["loss_high_percent"]
    facts = {
        f"at least {100 * arguments.min_share:.0f} % of linear weights in 8 bits or fewer": selected[
            "share_8bit_percent"
        ]
        >= 100 * arguments.min_share - 0.05,
        f"quality loss at most {arguments.limit_percent:g} % at the upper end of its interval": high
        is not None
        and high <= arguments.limit_percent,
    }
    rivals = {name: others[name] for name in arguments.beat if others[name]["bits_at_least_selected"]}
    words = {"lpips": "divergence", "loss_percent": "quality loss"}
    for metric, word in words.items():
        # No worse: the interval of the difference is not on the other's side. Beyond noise: it is on this plan's side.
        no_worse = [name for name, row in rivals.items() if not row[f"{metric}_more_high"] < 0]
        facts[f"no worse in {word} than each of {len(rivals)} plans of as many bits or more"] = len(
            no_worse
        ) == len(rivals)
        for name in (each for each in ("uniform-int8", "uniform-fp8") if each in rivals):
            more, low, high = (rivals[name][f"{metric}_more{end}"] for end in ("", "_low", "_high"))
            noise = "beyond noise" if low > 0 else "within noise"
            said = f"better in {word} than {name}: it has {more:+.4g} ({low:+.4g} to {high:+.4g}, {noise})"
            # Divergence is measured finely enough to ask for more than the mean.
            facts[said] = low > 0 if metric == "lpips" else more > 0
    fewer = [name for name in arguments.beat if name not in rivals]
    said = [f"{'yes' if held else 'NO'}: {what}" for what, held in facts.items()]
    said += [f"not compared, as it has fewer bits: {', '.join(fewer)}"] * bool(fewer)
    return {"facts": facts, "rivals": list(rivals), "said": said, "passed": all(facts.values())}


def table(rows: list[dict]) -> str:
    import pandas as pd

    shown = [
        "plan", "bits_per_weight", "share_8bit_percent", "loss_percent", "loss_low_percent", "loss_high_percent", "lpips",
        "lpips_low", "lpips_high", "lpips_floor", "effect", "lpips_more_low", "lpips_more_high", "loss_percent_more_low",
        "loss_percent_more_high",
    ]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=shown).to_string(index=False, float_format=lambda v: f"{v:.4g}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="wan-nano")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--output", type=Path, required=True, help="JSON file; a folder beside it keeps the recording")
    add("--recipe", type=Path, help="YAML file of the selected plan")
    add(
        "--objective",
        choices=("memory", "time"),
        default="memory",
        help="weight-only formats save memory, not time",
    )
    add("--limit-percent", type=float, default=3.0, help="of quality loss, upper end of its interval")
    add("--min-share", type=float, default=0.8, help="of linear weights in 8 bits or fewer")
    add("--max-bits", type=float, default=8.0, help="mean bits of a linear weight")
    add(
        "--headroom",
        type=float,
        default=0.5,
        help="of the least effect among --beat; 0 uses the whole quality budget",
    )
    add("--formats", nargs="+", default=["int8", "fp8", "fp8-channel", "int8-weight", "int4-weight"])
    add(
        "--rest",
        default="int8-weight",
        help="format of embedders and output; 'default' leaves them as they are",
    )
    add("--group", choices=("layer", "projection", "block"), default="layer")
    add("--by-steps", action="store_true")
    add("--beat", nargs="*", default=list(BEAT))
    add("--beside", nargs="*", default=list(BESIDE), help="shown, not held to be beaten")
    add("--cases", type=int, default=24, help="of the set `selection`")
    add("--final-cases", type=int, default=72, help="of the set `final`")
    add("--examples", type=int, default=4, help="generations to record")
    add("--probes", type=int, default=4, help="directions of the sensitivity")
    add("--tried", type=int, default=3, help="plans of the frontier to generate with")
    add(
        "--timed",
        action="store_true",
        help="time one forward of every expert, in turn with the unchanged one",
    )
    add("--batch", type=int, help="videos at once; by default as many as fit the device")
    add("--seed", type=int, default=7)
    for name in SIZE:
        add(f"--{name.replace('_', '-')}", type=float if name == "guidance_scale" else int)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
