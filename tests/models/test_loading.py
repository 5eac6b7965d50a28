"""Loading: equal to diffusers, honest about caches, and one clear line for whatever is broken."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models_tiny import save

from wanlab.core.errors import WanlabError
from wanlab.models import get, load, load_times
from wanlab.models import loading as pagecache
from wanlab.models import weights as ckpt
from wanlab.models import weights as room

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("text_encoder", "vae", "transformer", "transformer_2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_the_checkpoint_is_sharded_float32(tiny):
    from safetensors.torch import load_file

    for part in ("transformer", "transformer_2", "text_encoder", "vae"):
        assert len(shards(tiny / part)) > 1, part
        assert {str(t.dtype) for file in shards(tiny / part) for t in load_file(file).values()} == {
            "torch.float32"
        }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("tiny", "float32"), ("tiny", "bfloat16"), ("tiny", "float16"), ("wan-nano", "bfloat16")],
)
def test_equal_to_from_pretrained(name, dtype, tiny):
    import torch
    from diffusers import WanImageToVideoPipeline

    model = load(str(tiny) if name == "tiny" else name, device="cpu", dtype=dtype)
    reference = WanImageToVideoPipeline.from_pretrained(model.spec.source, dtype=getattr(torch, dtype))
    for part in PARTS:
        ours, theirs = tensors(getattr(model.pipeline, part)), tensors(getattr(reference, part))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype, (part, key)
            assert torch.equal(tensor, theirs[key]), (part, key)
        assert not getattr(model.pipeline, part).training
    assert model.pipeline.scheduler.config == reference.scheduler.config
    assert model.pipeline.config.boundary_ratio == reference.config.boundary_ratio
    ids = torch.tensor([[5, 6, 1, 0]])
    with torch.no_grad():
        text = [pipeline.text_encoder(ids).last_hidden_state for pipeline in (model.pipeline, reference)]
    assert torch.equal(*text)


def test_the_token_embedding_stays_tied(tiny):
    encoder = load(str(tiny), device="cpu", components=["text_encoder"]).pipeline.text_encoder
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_tied_weight_may_be_stored_under_its_other_name(copy):
    import torch
    from safetensors.torch import load_file, save_file

    before = load(str(copy), device="cpu", components=["text_encoder"]).pipeline.text_encoder.shared.weight
    for file in shards(copy / "text_encoder"):
        stored = load_file(file)
        renamed = {
            key.replace("shared.weight", "encoder.embed_tokens.weight"): t for key, t in stored.items()
        }
        save_file(renamed, file)
    index = copy / "text_encoder" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"shared.weight"', '"encoder.embed_tokens.weight"'))
    after = load(str(copy), device="cpu", components=["text_encoder"]).pipeline.text_encoder.shared.weight
    assert torch.equal(before, after)


def test_weights_outlive_their_files(copy):
    """A weight that were a view of the mapped file would change with it, or kill the process."""
    import torch

    model = load(str(copy), device="cpu", dtype="float32", components=["expert_high"])
    before = {key: tensor.clone() for key, tensor in tensors(model.pipeline.transformer).items()}
    for file in shards(copy / "transformer"):
        with open(file, "r+b") as handle:
            handle.write(b"\xff" * file.stat().st_size)
    assert all(
        torch.equal(before[key], tensor) for key, tensor in tensors(model.pipeline.transformer).items()
    )


def test_only_some_components(tiny):
    model = load(str(tiny), device="cpu", components=("expert_low", "vae_decoder"))
    assert list(model.components) == ["vae_encoder", "expert_low", "vae_decoder"]
    assert [part.part for part in model.load.parts] == ["transformer_2", "vae"]
    with pytest.raises(WanlabError, match="expert_high is not loaded"):
        model.component("expert_high")
    with pytest.raises(WanlabError, match=r"no component 'expert_lo' .did you mean 'expert_low'"):
        load(str(tiny), components=("expert_lo",))
    with pytest.raises(WanlabError, match="components is empty"):
        load(str(tiny), components=())


def test_report_counts_files_and_memory(tiny):
    report = load(str(tiny), device="cpu", dtype="bfloat16").load
    assert report.weights == "pretrained"
    assert report.read_bytes == sum(file.stat().st_size for part in PARTS for file in shards(tiny / part))
    model = load(str(tiny), device="cpu", dtype="bfloat16")
    held = sum(
        len({t.data_ptr(): t for t in tensors(module).values()}) and
        sum({t.data_ptr(): t.nbytes for t in tensors(module).values()}.values())
        for module in (getattr(model.pipeline, part) for part in PARTS)
    )  # fmt: skip
    assert report.memory_bytes == held
    frame = report.frame()
    assert list(frame["part"]) == [*(part.part for part in report.parts), "total"]
    assert frame["time_ms"].iloc[:-1].sum() <= frame["time_ms"].iloc[-1]
    assert report.gb_per_s == pytest.approx(report.read_bytes / report.time_ms / 1e6)


def test_page_cache_is_looked_at(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5_000_000)
    file.read_bytes()
    if pagecache.cached_fraction([file]) is None:  # no mincore: then no state is claimed either
        assert not pagecache.drop([file])
        return
    assert pagecache.cached_fraction([file]) == 1.0
    pagecache.drop([file])
    dropped = pagecache.cached_fraction([file])
    with open(file, "rb") as handle:
        handle.read(100_000)
    some = pagecache.cached_fraction([file])
    assert dropped <= some <= 1.0
    assert pagecache.cached_fraction([]) is None


@pytest.mark.parametrize(
    ("fraction", "state"), [(0.0, "cold"), (0.5, "partly cached"), (1.0, "warm"), (None, "unknown")]
)
def test_a_load_says_what_the_cache_held(tiny, monkeypatch, fraction, state):
    monkeypatch.setattr(pagecache, "cached_fraction", lambda files: fraction)
    assert load(str(tiny), device="cpu").load.state == state


def test_load_times_has_a_first_and_a_second_load(tiny):
    table = load_times(str(tiny), device="cpu")
    assert set(table["load"]) == {"first", "second"}
    total = table[table["part"] == "total"].set_index("load")
    assert (total["time_ms"] > 0).all()
    assert (total["read_bytes"] == total["read_bytes"].iloc[0]).all()
    assert total.loc["second", "state"] in ("warm", "unknown")
    assert total.loc["first", "cached_percent"] <= total.loc["second", "cached_percent"] or total.isna().any(
        axis=None
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_too_little_memory_is_refused_before_it_is_taken(tiny, monkeypatch, dtype):
    monkeypatch.setattr(room, "free_bytes", lambda device: 3 * 2**30)
    with pytest.raises(WanlabError) as caught:
        load("wan2.2-ti2v-5b", device="cpu", dtype=dtype, weights="random")
    said = str(caught.value)
    needed = {"float32": "42.7", "bfloat16": "21.5"}[dtype]
    assert f"needs {needed} GiB" in said
    assert "3.0 GiB are free" in said
    assert ('dtype="bfloat16"' in said) == (dtype == "float32")
    assert "\n" not in said


def test_free_memory_is_a_figure():
    import psutil
    import torch

    assert 0 < room.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(weights="none"), "weights is"),
        (dict(device="gpu"), "no device 'gpu'"),
        (dict(device="meta"), "device meta is not supported"),
        (dict(device="cuda:99"), "device cuda:99 is not here"),
        (dict(dtype="float61"), "in 'float61' .did you mean 'float16'"),
        (dict(dtype="int8"), "cannot be loaded in 'int8'"),
    ],
)
def test_wrong_options(tiny, options, says):
    with pytest.raises(WanlabError, match=says):
        load(str(tiny), **options)


def _no_shard(folder):
    shards(folder / "transformer")[1].unlink()


def _no_weights(folder):
    for file in (folder / "transformer").glob("diffusion_pytorch_model*"):
        file.unlink()


def _no_part(folder):
    shutil.rmtree(folder / "transformer_2")
    shutil.copytree(folder / "transformer", folder / "transformer_2", ignore=lambda *_: ["config.json"])


def _no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def _broken_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")


def _rewrite(change):
    def breaking(folder):
        from safetensors.torch import load_file, save_file

        file = next(f for f in shards(folder / "transformer") if "proj_out.weight" in load_file(f))
        save_file(change(load_file(file)), file)

    return breaking


def _index(change):
    def breaking(folder):
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return breaking


def _lost_from_index_and_file(folder):
    _rewrite(lambda stored: {k: t for k, t in stored.items() if k != "proj_out.weight"})(folder)
    _index(
        lambda index: {"weight_map": {k: f for k, f in index["weight_map"].items() if k != "proj_out.weight"}}
    )(folder)


def _other_config(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 48}))


def _impossible_config(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": "two"}))


def _unknown_pipeline(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("WanImageToVideoPipeline", "WanImageToVideosPipeline"))


def _unfit_pipeline(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("WanImageToVideoPipeline", "LTXImageToVideoPipeline"))


def _no_such_network(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("UMT5EncoderModel", "UMT9EncoderModel"))


def _foreign_library(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace('"transformers",\n    "UMT5', '"my_package",\n    "UMT5'))


def _text_in_place_of_weights(folder):
    shards(folder / "vae")[0].write_text("version https://git-lfs.github.com/spec/v1\n")


def _shards_without_index(folder):
    rest = shards(folder / "transformer")[1:]
    for file in (*rest, *(folder / "transformer").glob("*.index.json")):
        file.unlink()


def _longer_file(folder):
    with open(shards(folder / "vae")[0], "ab") as handle:
        handle.write(b"more")


@pytest.mark.parametrize(
    ("breaking", "says"),
    [
        (
            _no_shard,
            r"transformer/diffusion_pytorch_model-00002-of-\d+.safetensors is missing .* shards are there",
        ),
        (_no_weights, "transformer has no weights"),
        (_no_part, "transformer_2/config.json is missing"),
        (_no_tokenizer, "tokenizer is missing"),
        (_broken_tokenizer, "tokenizer cannot be read"),
        (
            _rewrite(lambda stored: {k: t for k, t in stored.items() if k != "proj_out.weight"}),
            "the index promises",
        ),
        (_lost_from_index_and_file, "lacks tensor proj_out.weight of WanTransformer3DModel"),
        (
            _rewrite(lambda stored: stored | {"proj_out.weight": stored["proj_out.weight"][:3]}),
            "has shape .3, 24.",
        ),
        (_index(lambda index: {}), "has no weight_map"),
        (_other_config, "config.json asks for .48"),
        (_impossible_config, "transformer: WanTransformer3DModel refuses its config.json"),
        (_unknown_pipeline, "no pipeline WanImageToVideosPipeline .did you mean 'WanImageToVideoPipeline'"),
        (_unfit_pipeline, "LTXImageToVideoPipeline has no part 'transformer_2'"),
        (_no_such_network, "the installed transformers has no UMT9EncoderModel"),
        (_foreign_library, "UMT5EncoderModel comes from 'my_package'"),
        (_text_in_place_of_weights, "is truncated or corrupt .*a pointer of Git LFS"),
        (_shards_without_index, r"has 1 of \d shards and no index"),
        (_longer_file, "is truncated or corrupt"),
    ],
)
def test_broken_folders(copy, breaking, says):
    breaking(copy)
    with pytest.raises(WanlabError, match=says) as caught:
        load(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value) or "UMT" in says or "refuses" in says


def test_unused_tensors_are_noted(copy):
    import torch

    _rewrite(lambda stored: stored | {"proj_in.weight": torch.zeros(2)})(copy)
    assert any(
        "transformer: 1 tensors of the files are not used" in n for n in load(str(copy), device="cpu").notes
    )


@given(cut=st.floats(0, 1, exclude_max=True), which=st.integers(0, 100))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(tiny, tmp_path, cut, which):
    files = shards(tiny / "transformer")
    file = files[which % len(files)]
    folder = tmp_path / "cut"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny / "transformer", folder)
    whole = file.read_bytes()
    (folder / file.name).write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(WanlabError, match="is truncated or corrupt") as caught:
        ckpt.open_checkpoint(folder)
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_corrupt_header_is_one_line_or_harmless(tiny, tmp_path, data):
    """Any byte of a header changed: refused in one line, or the tensors are all where they belong."""
    from wanlab.models.networks import skeleton

    folder = tmp_path / "corrupt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny / "vae", folder)
    file = shards(folder)[0]
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    network = skeleton(get(tiny).part("vae"))
    said = ""
    try:
        ckpt.check(ckpt.open_checkpoint(folder), network)
    except WanlabError as error:
        said = str(error)
    assert "\n" not in said


def test_random_weights_come_from_the_seed(tiny):
    import torch

    first, again, other = (load(str(tiny), device="cpu", weights="random", seed=seed) for seed in (1, 1, 2))
    for part in PARTS:
        ours = tensors(getattr(first.pipeline, part))
        assert all(torch.equal(t, tensors(getattr(again.pipeline, part))[k]) for k, t in ours.items())
        assert any(not torch.equal(t, tensors(getattr(other.pipeline, part))[k]) for k, t in ours.items())
    high, low = first.pipeline.transformer, first.pipeline.transformer_2
    assert not torch.equal(high.proj_out.weight, low.proj_out.weight)
    assert first.load.state == "no files"
    assert any("random weights from seed 1" in note for note in first.notes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_have_the_true_architecture(tiny, dtype):
    """Same names, shapes and dtypes as the real ones; computed buffers equal to the real ones; all finite."""
    import torch

    real, made = (load(str(tiny), device="cpu", dtype=dtype, weights=w) for w in ("pretrained", "random"))
    for part in PARTS:
        ours, theirs = tensors(getattr(made.pipeline, part)), tensors(getattr(real.pipeline, part))
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
            k: (t.shape, t.dtype) for k, t in theirs.items()
        }
        assert all(torch.isfinite(t).all() for t in ours.values())
    for name in ("freqs_cos", "freqs_sin"):
        ours, theirs = (getattr(m.pipeline.transformer.rope, name) for m in (made, real))
        assert torch.equal(ours, theirs)
    assert made.load.memory_bytes == real.load.memory_bytes


def test_random_hub_model_without_a_network(monkeypatch):
    """The decoder of the 5B model at true size, and nothing of it asks for the hub."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    model = load("wan2.2-i2v-a14b", device="cpu", weights="random", components=["vae_decoder"])
    assert sum(p.numel() for p in model.pipeline.vae.parameters()) == 126_892_531
    assert model.pipeline.scheduler.config.flow_shift == 3.0
