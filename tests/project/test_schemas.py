"""The YAML files of the project, their schemas and their loaders agree on what a file may say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from wanlab.cli import main as cli
from wanlab.configuration.configuration import load_configuration, parse_configuration
from wanlab.core.errors import WanlabError
from wanlab.core.yaml_lines import load_yaml, read_yaml
from wanlab.launch.grid import expand, load_grid
from wanlab.launch.schemas import KINDS, file_schema
from wanlab.precision.plan import load_plan, parse_plan

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = re.compile(r"# yaml-language-server: \$schema=(\S+)")
FILES = [
    *(("plan", path) for path in RECIPES.glob("*.yaml")),
    *(("configuration", path) for path in RECIPES.glob("configurations/*.yaml")),
    *(("sweep", path) for path in RECIPES.glob("sweeps/*.yaml")),
    *((path.stem, path) for path in RECIPES.glob("examples/*.yaml")),
]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    return {kind: Draft202012Validator(file_schema(kind)) for kind in KINDS}


def load_sweep(text: str, folder: Path) -> list:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return expand(load_grid(path), output=folder)


def test_the_committed_schemas_are_those_that_the_command_writes(tmp_path, capsys):
    assert cli.main(["schema", "--to", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
    kept = {path.name: path.read_text() for path in (RECIPES / "schemas").iterdir()}
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == kept, "write them again: wanlab schema --to recipes/schemas"
    for kind in KINDS:
        Draft202012Validator.check_schema(json.loads(written[f"{kind}.json"]))
    assert cli.main(["schema", "plan"]) == 0
    assert capsys.readouterr().out == written["plan.json"]


def test_schema_wants_a_kind_or_a_folder(capsys):
    assert cli.main(["schema"]) == 2
    assert "give a kind of file, plan, configuration, sweep, to print" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "path"), FILES, ids=[path.stem for _, path in FILES])
def test_every_recipe_fits_its_schema(schemas, kind, path):
    assert [error.message for error in schemas[kind].iter_errors(load_yaml(path, kind).data)] == []
    named = SCHEMA.match(path.read_text())
    assert named or path.parent == RECIPES, (
        "the first line names the schema; a plan that wanlab selected has none"
    )
    if named:
        assert (path.parent / named[1]).resolve() == RECIPES / "schemas" / f"{kind}.json"


def test_the_examples_load_and_use_every_field(schemas, tmp_path, monkeypatch, root):
    monkeypatch.chdir(root)
    folder = RECIPES / "examples"
    load_plan(folder / "plan.yaml")
    load_configuration(folder / "configuration.yaml")
    assert len(expand(load_grid(folder / "sweep.yaml"), output=tmp_path)) == 7
    for kind, own in (("plan", "Plan"), ("configuration", "Configuration"), ("sweep", "Grid")):
        fields = set(schemas[kind].schema["$defs"][own]["properties"])
        left_out = fields - set(load_yaml(folder / f"{kind}.yaml", kind).data)
        # `notebooks` stands in place of `notebook`; `made_for` is written by wanlab.
        assert left_out <= {"notebooks", "made_for"}
    rules = load_yaml(folder / "plan.yaml", "plan").data["rules"]
    assert set().union(*rules) == set(schemas["plan"].schema["$defs"]["Rule"]["properties"])


def test_every_field_is_described(schemas):
    for kind in KINDS:
        for name, record in schemas[kind].schema["$defs"].items():
            assert record["description"]
            bare = [field for field, value in record["properties"].items() if "description" not in value]
            assert not bare, f"{name}: the docstring has no line about {bare}"


PLAN = "name: p\nrules:\n- format: int8\n"
CONFIGURATION = "name: c\nengines: onnxruntime\n"
SWEEP = "name: s\nnotebook: 41_configuration\n"
BOTH_READ = {
    "plan": (
        PLAN,
        "name: p",
        PLAN + "  layers: attn1.*\n",
        PLAN + "  blocks: 3\n",
        PLAN + "  blocks: first 2, 5 , 7-9\n",
        PLAN + "  blocks: null\n",
        PLAN + "  steps: 0-2\nnum_steps: 4\n",
        PLAN + "  steps: null\n",
        PLAN.replace("int8", "int4-weight-32"),
        PLAN.replace("int8", "default") + "default: bf16\n",
    ),
    "configuration": (
        CONFIGURATION,
        "name: c\nengines: {vae_decoder: streamed_vae, 'expert*': compiled}\n",
        CONFIGURATION + "plan: uniform-int8\n",
        CONFIGURATION + "plan: default\n",
        CONFIGURATION + "plan: null\n",
        CONFIGURATION + "plan: {name: p, rules: [{format: int8, layers: ffn.*}]}\n",
        CONFIGURATION + "settings: {onnxruntime: {threads: 2, cuda_graph: true}}\n",
        CONFIGURATION + "techniques: []\n",
    ),
    "sweep": (
        SWEEP,
        SWEEP + "axes: {steps: [2, 4]}\n",
        SWEEP + "axes: {steps: {from: 2, to: 4}}\n",
        SWEEP + "axes: {steps: [1, {from: 2, to: 4}], plan: [default, uniform-int8]}\n",
        SWEEP + "axes: {engine: [eager, onnxruntime]}\nbaseline: {engine: eager}\n",
        "name: s\nnotebooks: [{notebook: 41_configuration, machine: alone}, {notebook: 10_baseline}]\n",
    ),
}
BOTH_REFUSE = {
    "plan": (
        "rules: []",
        "name: a b",
        PLAN + "rulez: []\n",
        PLAN + "  layer: x\n",
        PLAN + "  layers: []\n",
        PLAN + "  blocks: some\n",
        PLAN + "  blocks: first\n",
        PLAN + "  steps: 2\n",
        PLAN + "num_steps: 0\n",
        PLAN + "default: int8\n",
        PLAN.replace("int8", "int9"),
    ),
    "configuration": (
        "engines: eager",
        "name: c\nengines: onnx\n",
        "name: c\nengines: {expert: streamed_vae}\n",
        "name: c\nengines: {'*': onnx}\n",
        CONFIGURATION + "plan: uniform\n",
        CONFIGURATION + "plan: {name: p, rules: [{format: int9}]}\n",
        CONFIGURATION + "settings: {onnxruntime: {thread: 2}}\n",
        CONFIGURATION + "settings: {onnxruntime: {threads: 0}}\n",
        CONFIGURATION + "settings: {onnx: {threads: 2}}\n",
        CONFIGURATION + "techniques: [fast]\n",
    ),
    "sweep": (
        "name: s",
        SWEEP + "notebooks: [{notebook: 10_baseline}]\n",
        "name: a/b\nnotebook: 41_configuration\n",
        SWEEP + "machine: own\n",
        SWEEP + "repeats: 0\n",
        SWEEP + "limit_s: 0\n",
        SWEEP + "axes: {steps: 4}\n",
        SWEEP + "axes: {steps: []}\n",
        SWEEP + "axes: {steps: {from: 2}}\n",
        SWEEP + "axes: {steps: {from: 2, to: 4, by: 0}}\n",
        SWEEP + "axes: {steps: [{fro: 2, to: 4}]}\n",
        "name: s\nnotebooks: [{notebook: 10_baseline, axis: {}}]\n",
    ),
}


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    return {
        "plan": parse_plan,
        "configuration": parse_configuration,
        "sweep": lambda t: load_sweep(t, folder),
    }


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in BOTH_READ.items() for text in texts]
)
def test_schema_and_loader_read(schemas, loaders, kind, text):
    assert [error.message for error in schemas[kind].iter_errors(read_yaml(text, "", kind).data)] == []
    assert loaders[kind](text)


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in BOTH_REFUSE.items() for text in texts]
)
def test_schema_and_loader_refuse(schemas, loaders, kind, text):
    assert not schemas[kind].is_valid(read_yaml(text, "", kind).data)
    with pytest.raises(WanlabError):
        loaders[kind](text)
