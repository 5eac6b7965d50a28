"""The trained miniature: its layout is the big model's, and it does what captions say."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wanlab import models
from wanlab.cli import nano_eval as examine
from wanlab.cli.nano_eval import Journal
from wanlab.core.errors import WanlabError
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


def test_camera_and_shapes_are_judged_apart():
    case = next(c for c in heldout.draw_cases(18, objects=(2,)) if c.clip.motion == "pan_left")
    truth = case.truth()
    right = {"follows_caption": True, "camera_follows": True, "shapes": 2, "shapes_follow": 2}
    assert examine.judge_motion(truth, case.clip) == right
    without = heldout.render_clip(case.photograph, dataclasses.replace(case.clip, objects=()))
    wrong = {"follows_caption": False, "camera_follows": True, "shapes": 2, "shapes_follow": 0}
    assert examine.judge_motion(without, case.clip) == wrong

    rows = pd.DataFrame([right, right, wrong, wrong | {"shapes": 0, "follows_caption": True}])
    figures = examine.motion_figures(rows)
    assert figures["follows_caption_percent"] == 75
    assert figures["camera_follows_percent"] == 100
    assert figures["shapes_follow_percent"] == pytest.approx(100 * 4 / 6)
    low, high = figures["shapes_follow_percent_interval"]
    assert 0 <= low < 100 * 4 / 6 < high <= 100


def test_sharpness_is_one_for_the_truth_and_less_for_a_blurred_video():
    truth = heldout.example_case().truth(2)
    blurred = (truth[:, 1:-1, 1:-1] + truth[:, :-2, 1:-1] + truth[:, 1:-1, :-2]) / 3
    assert examine.scores(truth, truth, ())["sharpness"] == 1
    assert examine.scores(truth[:, 1:-1, 1:-1], blurred, ())["sharpness"] < 0.5


def test_groups_keep_their_order_and_have_intervals():
    rows = [
        {"steps": steps, "psnr_db": 20.0 + steps + i, "sharpness": 0.5, "lpips_x": 0.1 * i}
        for i in range(4)
        for steps in (40, 4)
    ]
    many, few = examine.grouped(pd.DataFrame(rows), ["steps"], ["x"])
    assert (many["steps"], few["steps"], few["clips"]) == (40, 4, 4)
    assert many["psnr_db"] == 61.5
    assert few["lpips_x_interval"][0] < few["lpips_x"] < few["lpips_x_interval"][1]


def test_photographs_of_other_sources_are_read_from_their_folder(tmp_path):
    own = examine.held_out_photographs(None)
    assert [source for source, _ in own] == ["scikit-image"] * 3 + ["scikit-learn"] * 2 + ["matplotlib"]
    with pytest.raises(WanlabError, match=r"holds no held-out photographs.*training\.photographs"):
        examine.held_out_photographs(tmp_path)
    (tmp_path / "heldout").mkdir()
    Image.new("RGB", (900, 600), "olive").save(tmp_path / "heldout" / "dragonfly.jpg")
    rows = [
        {"name": "dragonfly", "package": "lomiri-wallpapers-16.04", "held_out": True},
        {"name": "alpaca", "package": "kdewallpapers", "held_out": False},
    ]
    (tmp_path / "index.json").write_text(json.dumps({"photographs": rows}))
    found = examine.held_out_photographs(tmp_path)
    assert [source for source, _ in found[6:]] == ["lomiri-wallpapers-16.04"]
    assert found[6][1].shape == (512, 768, 3)


def asked(*options: str):
    parser = argparse.ArgumentParser()
    examine.add_arguments(parser)
    return examine.chosen_cases(parser.parse_args(options))


def test_cases_have_the_size_and_the_content_asked_for():
    assert asked() == heldout.draw_cases(72)
    assert asked("--set", "final", "--cases", "12") == heldout.load_cases("final", 12)
    large = asked("--size", "large", "--cases", "36")
    assert {len(case.clip.objects) for case in large} == {0, 1, 2, 3}
    assert large[0].clip.frames == 33
    other = asked("--size", "192x288x25", "--cases", "9", "--shapes", "3", "--textures", "1")
    assert all(case.photograph.startswith(heldout.TEXTURE) for case in other)
    assert {(case.clip.height, len(case.clip.objects)) for case in other} == {(192, 3)}
    with pytest.raises(WanlabError, match="leave --set out"):
        asked("--set", "final", "--shapes", "3")
    with pytest.raises(WanlabError, match="HEIGHTxWIDTHxFRAMES"):
        asked("--size", "192x288")


@pytest.mark.slow
def test_the_command_writes_tables_by_shapes_setting_and_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examine, "CLIPS_PER_PHOTOGRAPH", 1)
    parser = argparse.ArgumentParser()
    examine.add_arguments(parser)
    options = ["--size", "64x96x5", "--cases", "9", "--shapes", "1", "--steps", "2", "--guidance", "1"]
    status = examine.main(parser.parse_args([*options, "--json", str(tmp_path / "all.json")]))
    assert status == 1  # so small it was never trained
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["size"] == {"height": 64, "width": 96, "frames": 5}
    assert [(row["steps"], row["guidance_scale"]) for row in found["by_setting"]] == [(2, 1.5), (10, 1.0)]
    assert [row["source"] for row in found["by_source"]] == list(heldout.SOURCES)
    assert [(row["shapes"], row["clips"]) for row in found["by_shapes"]] == [(1, 9)]
    assert {"camera_follows_percent_interval", "shapes_follow_percent"} <= set(
        found["figures"]["stlpips-alex"]
    )
    said = capsys.readouterr().out
    assert "camera_follows_percent" in said
    assert "matplotlib" in said


def test_summary_counts_and_compares(nano):
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
