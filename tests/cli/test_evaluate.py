from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from wanlab import evaluate
from wanlab.cli import evaluate as cli
from wanlab.core.errors import WanlabError
from wanlab.evaluate import ALL_METRICS


@pytest.fixture
def videos(tmp_path):
    coarse = np.random.default_rng(0).random((4, 4, 6, 3))
    frames = np.kron(coarse, np.ones((1, 8, 8, 1))) * 0.8 + 0.1
    worse = np.clip(frames + np.random.default_rng(1).normal(0, 0.05, frames.shape), 0, 1)
    return (
        str(evaluate.write_video(tmp_path / "a.mp4", frames, 8)),
        str(evaluate.write_video(tmp_path / "b.mp4", worse, 8)),
    )


def run(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(["--no-progress", *arguments]))


def test_prints_a_table_and_writes_json(videos, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("--original", videos[0], "--optimized", videos[1], "--metric", "lpips") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "metric",
        "backbone",
        "mean",
        "worst",
        "worst",
        "frame",
        "drift",
        "per",
        "frame",
    ]
    assert lines[2].split()[:2] == ["lpips", "stlpips-alex"]
    assert lines[-1] == "scores written to b.scores.json"
    data = json.loads((tmp_path / "here" / "b.scores.json").read_text())
    assert list(data["metrics"]) == ["lpips"]
    assert len(data["metrics"]["lpips"]["per_frame"]) == data["frames"] == 4
    assert f"{data['metrics']['lpips']['mean']:.5f}" in lines[2]


def test_several_metrics_and_a_place_of_ones_own(videos, tmp_path, capsys):
    target = tmp_path / "new" / "out.json"
    common = ("--original", videos[0], "--optimized", videos[1], "--json", str(target), "--device", "cpu")
    assert run(*common, "--metric", "psnr", "--metric", "ssim") == 0
    assert list(json.loads(target.read_text())["metrics"]) == ["psnr", "ssim"]
    assert " dB" in capsys.readouterr().out
    assert run(*common, "--metric", "all") == 0
    assert list(json.loads(target.read_text())["metrics"]) == list(ALL_METRICS)


def test_a_perfect_copy_is_said_to_be_one(videos, tmp_path, capsys):
    run(
        "--original",
        videos[0],
        "--optimized",
        videos[0],
        "--metric",
        "all",
        "--json",
        str(tmp_path / "o.json"),
    )
    out = capsys.readouterr().out
    assert "inf dB" in out
    assert "0.00000" in out
    assert "1.00000" in out


def test_mistakes_write_nothing(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WanlabError, match=r"nowhere\.mp4 does not exist"):
        run("--original", "nowhere.mp4", "--optimized", videos[1])
    with pytest.raises(WanlabError, match="did you mean 'psnr'"):
        run("--original", videos[0], "--optimized", videos[1], "--metric", "psrn")
    assert sorted(tmp_path.iterdir()) == before
