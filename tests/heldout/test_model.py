"""The trained miniature: its layout is the big model's, and it does what captions say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wanlab import models
from wanlab.cli import nano_eval as examine
from wanlab.cli.nano_eval import Journal
from wanlab.heldout import cases as heldout
from wanlab.heldout.motion import follows_caption


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano", device="cpu", dtype="float32")


def test_folder_has_the_layout_of_wan22_i2v_a14b(root):
    folder = root / "data" / "wan-nano"
    index = json.loads((folder / "model_index.json").read_text())
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["boundary_ratio"] == 0.9
    assert classes["transformer"] == classes["transformer_2"] == "WanTransformer3DModel"
    assert classes["vae"] == "AutoencoderKLWan"
    assert classes["text_encoder"] == "UMT5EncoderModel"
    assert classes["scheduler"] == "UniPCMultistepScheduler"
    assert json.loads((folder / "transformer" / "config.json").read_text())["in_channels"] == 36
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24e6


@pytest.mark.slow
def test_it_follows_a_caption_and_one_expert_alone_is_another_video(nano):
    case = heldout.example_case()
    truth = case.truth()
    both = nano.generate(truth[0], case.caption, seed=case.seed).video
    assert follows_caption(both, case.clip)
    for variant in ("high_only", "low_only"):
        alone = examine.with_one_expert(nano, variant).generate(truth[0], case.caption, seed=case.seed).video
        assert np.square(alone - truth).mean() > np.square(both - truth).mean()


@pytest.mark.slow
def test_vae_keeps_the_picture(nano):
    truth = heldout.example_case().truth()
    restored = examine.reconstruct(nano, truth)
    assert restored.shape == truth.shape
    assert -10 * np.log10(np.square(restored - truth).mean()) >= 24.0


def test_an_interrupted_examination_goes_on_where_it_was(tmp_path, monkeypatch):
    asked = []

    def one_row(model, case, **options):
        asked.append(case)
        if case == "breaks" and asked.count(case) == 1:
            raise KeyboardInterrupt
        return [{"video": "both", "caption": case}]

    monkeypatch.setattr(examine, "examine_case", one_row)
    results, cases = tmp_path / "results.json", ["a", "b", "breaks", "c"]
    with pytest.raises(KeyboardInterrupt):
        examine.examine(None, cases, journal=Journal(results, "weights 1"), progress=False)
    with (tmp_path / "results.json.journal").open("a") as file:
        file.write('[{"case": 2, "vid')  # the machine went away in the middle of a line
    journal = Journal(results, "weights 1")
    table = examine.examine(None, cases, journal=journal, progress=False)
    assert table["case"].tolist() == [0, 1, 2, 3]
    assert table["caption"].tolist() == cases
    assert asked == ["a", "b", "breaks", "breaks", "c"]
    assert Journal(results, "weights 2").cases == []
    journal.done()
    assert not list(tmp_path.iterdir())


def test_summary_counts_and_compares(nano):
    import pandas as pd

    rows = [
        {"case": c, "video": v, "psnr_db": p, "follows_caption": f, "lpips_x": score}
        for c in (0, 1)
        for v, p, f, score in (
            ("both", 20.0, c == 0, 0.2), ("high_only", 15.0, False, 0.4), ("low_only", 18.0, True, 0.3),
            ("frozen", 17.0, None, 0.4), ("vae", 26.0, None, 0.1),
        )
    ]  # fmt: skip
    figures = examine.summary(pd.DataFrame(rows), "x")
    assert figures["follows_caption_percent"] == 50
    assert figures["lpips_below_frozen_percent"] == pytest.approx(50)
    assert figures["high_only_worse_percent"] == pytest.approx(100)
    met = {name: ok for name, _, _, ok in examine.verdicts(figures)}
    assert met == {
        "vae_psnr_db": True,
        "follows_caption_percent": False,
        "lpips_below_frozen_percent": True,
        "high_only_worse_percent": True,
        "low_only_worse_percent": True,
    }
