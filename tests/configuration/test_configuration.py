"""Configurations as data: what is written is read back, mistakes name their line, and the hash is of what it does."""

from __future__ import annotations

import shutil
import subprocess
import sys

import msgspec
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from wanlab.cli import main as cli
from wanlab.configuration import (
    Configuration,
    configurations,
    load_configuration,
    parse_configuration,
    save_configuration,
)
from wanlab.configuration.configuration import identity
from wanlab.configuration.explain import explain
from wanlab.core.errors import WanlabError
from wanlab.core.paths import data
from wanlab.engines.registry import ENGINES
from wanlab.launch.grid import expand, load_grid
from wanlab.models.spec import COMPONENTS
from wanlab.precision.plan import PRESETS, make_plan

TEXT = """\
name: mine
about: a try
engines:
  expert_high: onnxruntime
  vae_decoder: streamed_vae
plan:
  name: ffn
  rules:
    - format: int8-weight
      layers: [ffn.*]
      component: expert_high
techniques: []
settings:
  onnxruntime:
    threads: 2
"""

NAMES = st.text("abcXYZ019_.+-", min_size=1, max_size=12)
WHOLE = [name for name, kind in ENGINES.items() if kind.plans]  # engines on which experts take a plan
VALUES = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=8))


@st.composite
def plans(draw):
    if draw(st.booleans()):
        return draw(st.sampled_from([None, *PRESETS.values()]))
    rule = st.fixed_dictionaries(
        {"format": st.sampled_from(["fp8", "int8", "int4-weight-32", "bf16", "default"])},
        optional={
            "component": st.sampled_from(["expert*", "expert_low"]),
            "blocks": st.sampled_from(["0-2", "first 1, last 1", "3"]),
            "layers": st.sampled_from([("ffn.*",), ("attn1.to_q", "proj_out")]),
            "steps": st.sampled_from(["0-3", "1"]),
            "note": st.text(max_size=8),
        },
    )
    rules = draw(st.lists(rule, max_size=3))
    return make_plan(draw(NAMES), draw(st.sampled_from(["model", "bf16"])), rules, num_steps=8)


@st.composite
def valid(draw) -> Configuration:
    """Any configuration that says nothing wrong."""
    if draw(st.booleans()):
        engines = draw(st.sampled_from(list(ENGINES)))
        used = {engines}
    else:
        runs = {name: [e for e in (WHOLE if name in ("expert*", "expert_low") else ENGINES) if _runs(e, name)]
                for name in (*COMPONENTS, "expert*", "vae_*") if not name.startswith("expert_h")}  # fmt: skip
        chosen = draw(st.lists(st.sampled_from(list(runs)), unique=True))
        engines = {name: draw(st.sampled_from(runs[name])) for name in chosen}
        used = set()
    plan = draw(plans())
    if engines == "tvm":
        plan = None
    if isinstance(engines, dict) and engines.get("expert") == "tvm":
        plan = None
    bare = Configuration(name=draw(NAMES), about=draw(st.text(max_size=20)), engines=engines, plan=plan)
    used = {bare.engine_of(name) for name in (*COMPONENTS, "")}
    settings = {}
    for name in sorted(used):
        known = sorted(ENGINES[name].settings)
        if known and draw(st.booleans()):
            chosen = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
            settings[name] = {each: draw(_value(ENGINES[name], each)) for each in chosen}
    return msgspec.structs.replace(bare, settings=settings)


def _value(kind, setting: str):
    """Values that a setting can have; any where it states no type."""
    able = [True, False, 1, 2, "auto", "cpu", "all", "tiled", "lazy", 0.5]
    typed = [value for value in able if not kind.setting_fault(setting, value)]
    return st.sampled_from(typed) if setting in kind.setting_types else VALUES


def _runs(engine: str, pattern: str) -> bool:
    import fnmatch

    return all(ENGINES[engine].runs(name) for name in fnmatch.filter(COMPONENTS, pattern))


@given(valid())
@example(
    Configuration(name="a", about="\x85 and \u2028")
)  # line breaks of YAML, which would be read as spaces
def test_what_is_written_is_read_back(configuration):
    assert list(configuration.check()) == []
    again = parse_configuration(configuration.to_yaml())
    assert again == configuration
    assert again.hash == configuration.hash
    assert again.to_yaml() == configuration.to_yaml()
    for component in COMPONENTS:
        assert again.engine_of(component) == configuration.engine_of(component)


MISTAKES = {  # replaced in TEXT: by what, on which line, what the message says
    "a field": ("about: a try", "abuot: a try", 2, "no field 'abuot' (did you mean 'about'?)"),
    "a name": ("name: mine", "name: my own", 1, "cannot be a file name"),
    "a name that is a number": ("name: mine", "name: 12", 1, "Expected `str`, got `int`"),
    "text of another type": ("about: a try", "about: [a, try]", 2, "Expected `str`, got `array`"),
    "an engine": ("expert_high: onnxruntime", "expert_high: onxruntime", 4, "did you mean 'onnxruntime'"),
    "an engine that is no text": ("expert_high: onnxruntime", "expert_high: 3", 4, "are text, not 3"),
    "a component": ("expert_high: onnx", "expert_hihg: onnx", 4, "did you mean 'expert_high'"),
    "an engine that cannot": ("vae_decoder:", "text_encoder:", 5, "streamed_vae runs vae_encoder and vae_decoder"),
    "a format of the plan": ("int8-weight", "int9-weight", 9, "did you mean 'int8-weight'"),
    "a field of a rule": ("      layers", "      layer", 10, "did you mean 'layers'"),
    "a field of the plan": ("  rules:", "  ruls:", 8, "did you mean 'rules'"),
    "a technique": ("techniques: []", "techniques: [teacache]", 12, "no technique 'teacache'"),
    "settings of an engine that runs nothing": ("  onnxruntime:\n", "  tvm:\n", 14, "no component runs on 'tvm'"),
    "a setting": ("threads: 2", "thread: 2", 15, "did you mean 'threads'"),
    "a setting of another type": ("threads: 2", "threads: [2]", 15, "not list"),
    "settings without an engine": ("  onnxruntime:\n    threads: 2", "  threads: 2", 14, "engine: {setting: value}"),
    "no YAML": ("  vae_decoder", "   vae_decoder", 5, "mapping values are not allowed"),
    "a key twice": ("techniques: []", "about: again", 12, "'about' is given twice"),
}  # fmt: skip


def test_the_text_of_the_mistakes_has_none():
    configuration = parse_configuration(TEXT)
    assert configuration.engine == "onnxruntime + streamed_vae"
    assert configuration.engine_of("expert_low") == "eager"
    assert configuration.plan.rules[0].layers == ("ffn.*",)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_names_its_line(mistake):
    before, after, line, message = MISTAKES[mistake]
    assert TEXT.count(before) == 1
    with pytest.raises(WanlabError) as error:
        parse_configuration(TEXT.replace(before, after), "mine.yaml")
    assert str(error.value).startswith(f"mine.yaml, line {line}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nabout: 3.5\n", "Expected `str`, got `float`"),
        ("name: !!int abc\n", "quote it where text is meant"),
        ("name: a\nengines: &a {'*': *a}\n", "contains itself by an alias"),
        ("name: a\nabout: " + "[" * 3000, "nesting depth"),
        ("name: a\nabout: b\x00\n", "control characters are not allowed"),
    ],
)
def test_what_yaml_cannot_hold_is_one_line(text, message):
    with pytest.raises(WanlabError, match=message) as error:
        parse_configuration(text, "mine.yaml")
    assert str(error.value).startswith("mine.yaml")
    assert "\n" not in str(error.value)


@given(st.data())
def test_any_field_of_another_type_names_its_line(data):
    """Whichever value is replaced by a list of lists, the message begins with that value's line or the one around it."""
    loaded = yaml.safe_load(TEXT)
    paths = list(_leaves(loaded))
    path = data.draw(st.sampled_from(paths))
    parent = loaded
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = [[["wrong"]]]
    text = yaml.safe_dump(loaded, sort_keys=False)
    lines = text.splitlines()
    with pytest.raises(WanlabError) as error:
        parse_configuration(text, "mine.yaml")
    line = int(str(error.value).removeprefix("mine.yaml, line ").partition(",")[0].partition(":")[0])
    name = next(key for key in reversed(path) if isinstance(key, str))
    assert f"{name}:" in lines[line - 1] or "wrong" in lines[line - 1], (str(error.value), lines[line - 1])


def _leaves(value, at=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*at, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*at, index))
    else:
        yield at


def test_the_hash_is_of_what_it_does():
    mine = parse_configuration(TEXT)
    renamed = (
        TEXT.replace("name: mine", "name: yours").replace("a try", "another").replace("name: ffn", "name: f")
    )
    assert parse_configuration(renamed).hash == mine.hash
    spelled = TEXT.replace("  vae_decoder: streamed_vae", "  vae_decoder: streamed_vae\n  expert_low: eager")
    assert parse_configuration(spelled).hash == mine.hash
    for before, after in (("threads: 2", "threads: 3"), ("ffn.*", "attn1.*"), ("vae_decoder", "vae_encoder")):
        assert parse_configuration(TEXT.replace(before, after)).hash != mine.hash
    assert (
        Configuration(name="a", engines={"*": "onnxruntime"}).hash
        == load_configuration(engine="onnxruntime").hash
    )


def test_the_last_pattern_that_fits_counts():
    text = "name: a\nengines: {'*': onnxruntime, 'vae_*': streamed_vae, expert_low: tvm}\n"
    found = parse_configuration(text)
    assert [found.engine_of(name) for name in ("text_encoder", "vae_encoder", "expert_high", "expert_low")] == [
        "onnxruntime", "streamed_vae", "onnxruntime", "tvm",
    ]  # fmt: skip
    assert found.engine == "onnxruntime + tvm + streamed_vae"


def test_one_name_is_for_the_components_that_usually_run_on_it():
    compiled, streamed = load_configuration(engine="compiled"), load_configuration(engine="streamed_vae")
    on = {name: (compiled.engine_of(name), streamed.engine_of(name)) for name in COMPONENTS}
    assert on["expert_low"] == ("compiled", "eager")
    assert on["vae_decoder"] == ("eager", "streamed_vae")


def test_a_plan_file_lies_beside_the_configuration(tmp_path):
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "p.yaml").write_text("name: p\nrules:\n  - format: int8\n")
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nplan: plans/p.yaml\n")
    mine = load_configuration(path)
    assert mine.plan_name == "p"
    assert load_configuration(save_configuration(mine, tmp_path / "elsewhere" / "b.yaml")) == mine
    (tmp_path / "plans" / "p.yaml").write_text("name: p\nrules:\n  - format: fp8\n")
    assert load_configuration(path).hash != mine.hash
    path.write_text("name: mine\nplan: plans/q.yaml\n")
    with pytest.raises(WanlabError, match=r"mine.yaml, line 2, plan: no plan at plans/q.yaml"):
        load_configuration(path)


def test_engine_and_plan_beside_a_configuration_have_to_be_its_own():
    assert load_configuration("onnxruntime", engine="onnxruntime").name == "onnxruntime"
    assert load_configuration("onnxruntime-int8-weights", plan="uniform-int8-weight").plan_name
    for given_too, message in (
        ({"engine": "compiled"}, "has engine=onnxruntime, and engine=compiled is given beside it"),
        ({"plan": "uniform-int8"}, "has plan=default, and plan=uniform-int8 is given beside it"),
    ):
        with pytest.raises(WanlabError, match=message):
            load_configuration("onnxruntime", **given_too)
    with pytest.raises(WanlabError, match="tvm, which runs expert_high, applies no precision plan"):
        load_configuration(engine="tvm", plan="uniform-int8")
    with pytest.raises(WanlabError, match=r"no configuration 'onnxruntim' \(did you mean 'onnxruntime'\?\)"):
        load_configuration("onnxruntim")


def test_the_identity_of_a_run_is_that_of_its_configuration(tmp_path):
    parameters = {"configuration": None, "engine": "onnxruntime", "plan": "uniform-int8-weight"}
    named = identity(parameters | {"configuration": "onnxruntime-int8-weights"})
    assert named["name"] == "onnxruntime-int8-weights"
    assert identity(parameters) == {"name": "onnxruntime uniform-int8-weight", "hash": named["hash"]}
    assert identity({"engine": "eager"}) is None
    path = tmp_path / "mine.yaml"
    hashes = set()
    for engine in ("onnxruntime", "eager", "eager  # said in other words"):
        path.write_text(f"name: mine\nengines: {engine}\n")
        hashes.add(identity({"configuration": str(path)})["hash"])
    assert len(hashes) == 2


def test_what_comes_with_wanlab_is_sound():
    known = configurations()
    assert {"eager", "compiled", "onnxruntime", "streamed-vae", "wan-nano-3-percent"} <= set(known)
    for name, configuration in known.items():
        assert configuration.name == name
        assert 20 < len(configuration.about) < 130
    hashes = [configuration.hash for configuration in known.values()]
    assert len(set(hashes)) == len(hashes)


def test_reading_one_loads_no_torch():
    code = (
        "import sys; from wanlab.configuration.configuration import configurations; configurations();"
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_command_lists_shows_and_explains(tmp_path, capsys):
    assert cli.main(["config", "list"]) == 0
    assert "onnxruntime-int8-weights  every network in ONNX Runtime" in capsys.readouterr().out
    assert cli.main(["config", "show", "wan-nano-3-percent"]) == 0
    shown = capsys.readouterr().out
    assert parse_configuration(shown).hash == shown.split()[2]
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    size = ["--height", "64", "--width", "64", "--frames", "5", "--device", "cpu"]
    assert cli.main(["config", "explain", str(path), *size]) == 0
    told = capsys.readouterr().out
    folder = "outputs/configured/wan-nano-pretrained-float32/64x64x5"
    plan = parse_configuration(TEXT).plan.hash[:12]
    assert "expert_high   ONNX Runtime, plan ffn in the graph" in told
    assert f"{folder}/plan-{plan}/expert_high.onnx" in told
    assert "expert_low    PyTorch, eager" in told
    assert "12 layers" in told
    assert "int8-weight" in told
    assert "plan ffn on expert_high: the types of every layer's nodes in the graph" in told
    assert "1 of 5 networks run in ONNX Runtime, VAE chunk by chunk" in told
    path.write_text(TEXT.replace("threads", "thread"))
    assert cli.main(["config", "show", str(path)]) == 2
    assert "line 15, settings.onnxruntime.thread: onnxruntime has no setting" in capsys.readouterr().err


def test_what_this_machine_lacks_is_one_line_each(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nengines: {expert_high: tensorrt}\nplan: uniform-fp8\n")
    assert cli.main(["config", "explain", str(path), "--device", "cpu"]) == 0
    told = capsys.readouterr().out.partition("this machine lacks\n")[2].partition("\n\n")[0].splitlines()
    assert len(told) == 2
    assert "TensorRT" in told[0]
    assert "expert_low" in told[1]
    assert "fp8" in told[1]


GRID = """\
name: g
notebook: 41_configuration
parameters: {model: wan-nano}
axes:
  configuration:
    - eager
    - mine.yaml
"""


def runs_of(text, folder):
    """Label and run_id of each run of a grid."""
    (folder / "grid.yaml").write_text(text)
    return {task.label: task.run_id for task in expand(load_grid(folder / "grid.yaml"), output=folder)}


def test_a_sweep_varies_configurations_and_knows_them_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(TEXT)
    first = runs_of(GRID, tmp_path)
    assert list(first) == ["configuration=eager", "configuration=mine"]
    mine.write_text("# a comment\n" + TEXT)
    assert runs_of(GRID, tmp_path) == first
    mine.write_text(TEXT.replace("threads: 2", "threads: 3"))
    changed = runs_of(GRID, tmp_path)
    assert changed["configuration=eager"] == first["configuration=eager"]
    assert changed["configuration=mine"] != first["configuration=mine"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "- eager",
            "- eagr",
            "line 5, axes.configuration: configuration=eagr: no configuration 'eagr' (did you",
        ),
        (
            "parameters: {",
            "parameters: {engine: tvm, ",
            "has engine=eager, and engine=tvm is given beside it",
        ),
    ],
)
def test_a_sweep_names_the_line_of_a_configuration_that_does_not_exist(
    tmp_path, monkeypatch, before, after, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(TEXT)
    with pytest.raises(WanlabError) as error:
        runs_of(GRID.replace(before, after), tmp_path)
    assert message in str(error.value)


def test_the_sweep_of_configurations_that_comes_with_wanlab_is_sound(tmp_path):
    tasks = expand(load_grid("recipes/sweeps/wan-nano-configurations.yaml"), output=tmp_path)
    assert {task.axes["configuration"] for task in tasks} <= set(configurations())


@pytest.mark.parametrize(
    ("engine", "setting", "says"),
    [
        ("onnxruntime", "threads: lots", "threads of onnxruntime is 'lots'"),
        ("onnxruntime", "threads: 0", "threads of onnxruntime is 0"),
        ("onnxruntime", "provider: gpu", "provider of onnxruntime is 'gpu'"),
        ("tvm", "fast_math: 3", "fast_math of tvm is 3"),
        ("tensorrt", "level: 9", "level of tensorrt is 9"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_when_it_is_read(engine, setting, says):
    text = f"name: x\nengines: {{expert*: {engine}}}\nsettings:\n  {engine}:\n    {setting}\n"
    with pytest.raises(WanlabError, match=says) as caught:
        parse_configuration(text)
    assert "line 5" in str(caught.value)


@pytest.mark.parametrize("size", [{"height": 0}, {"width": 63}, {"frames": 0}])
def test_sizes_that_are_not_legal_are_refused_by_explain_too(size):
    with pytest.raises(WanlabError, match=f"{next(iter(size))} must be|not legal"):
        explain("eager", "wan-nano", device="cpu", **size)


def test_explain_says_that_memory_and_weights_are_lacking(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    large = explain("eager", "wan2.2-i2v-a14b", device="cpu", height=16384, width=16384, frames=4093)
    said = " ".join(large.missing)
    assert "the weights of wan2.2-i2v-a14b (Wan-AI/Wan2.2-I2V-A14B-Diffusers)" in said
    assert "wan2.2-i2v-a14b in float32 needs 1" in said
    assert "a video of 16384x16384 with 4093 frames needs at least" in said
    folder = shutil.copytree(
        data("wan-nano"), tmp_path / "nano", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert any("has no weights" in line for line in explain("eager", str(folder), device="cpu").missing)
    assert not any("GiB" in line for line in explain("eager", "wan-nano", device="cpu").missing)
