"""Flame graphs: totals are the trace's own, own times are the profiler's, and differences close."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.diagnose_traces import event, trace_of

from wanlab import diagnose, models, plots
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout


def nested(draw, start: float, time: float, depth: int) -> tuple[list[dict], float]:
    """Events inside [start, start + time), properly nested, and the time of the outermost among them."""
    made, outermost, at = [], 0, start
    for _ in range(draw(st.integers(0, 3 if depth else 0))):
        gap, long = draw(st.integers(0, 3)), draw(st.integers(1, 40))
        if at + gap + long > start + time:
            break
        inside, _ = nested(draw, at + gap, long, depth - 1)
        made += [event(draw(st.sampled_from("abc")), at + gap, long), *inside]
        outermost += long
        at += gap + long
    return made, outermost


@given(data=st.data())
def test_totals_are_the_traces_own_sums(tmp_path_factory, data):
    first, _ = nested(data.draw, 0, 200, 3)
    second, outermost = nested(data.draw, 0, 100, 2)
    events = [event("top", 0, 200), *first, *(e | {"tid": 2} for e in second)]
    flame = diagnose.cpu_flame(trace_of(tmp_path_factory.mktemp("t"), *events))
    assert flame.total_us == pytest.approx(200 + outermost)
    assert flame.frame["self_us"].sum() == pytest.approx(flame.total_us)
    assert int(flame.frame["count"].sum()) == len(events)


def test_kernels_stand_below_what_launched_them(tmp_path):
    trace = trace_of(
        tmp_path,
        event("expert_low", 0, 50, "user_annotation"),
        event("aten::mm", 5, 20),
        event("cudaLaunchKernel", 6, 2, "cuda_runtime", correlation=1),
        event("gemm", 30, 40, "kernel", thread=9, correlation=1, stream=7),
        event("lost", 90, 5, "kernel", thread=9, stream=7),
    )
    flame = diagnose.gpu_flame(trace)
    assert flame.folded().splitlines() == ["expert_low;aten::mm;gemm 40", "(launch not in the trace);lost 5"]
    assert flame.total_us == trace.kernels["time_us"].sum()
    assert list(flame.own_time()["name"]) == ["gemm", "lost"]


def test_a_trace_without_a_gpu_has_no_gpu_flame(tmp_path):
    with pytest.raises(WanlabError, match="no GPU events"):
        diagnose.gpu_flame(trace_of(tmp_path, event("a", 0, 1)))
    both = diagnose.flames(trace_of(tmp_path, event("a", 0, 1)))
    assert (both.gpu, both.own_time("gpu")) == (None, None)
    assert both.main is both.cpu
    assert "no GPU events" in both.notes
    assert both.row()["flame_ms"] == both.cpu.total_us / 1e3


def test_steps_are_merged_unless_they_are_asked_for(tmp_path):
    events = [
        e for i in (0, 1)
        for e in (event(f"ProfilerStep#{i}", 100 * i, 90, "user_annotation"), event("a", 100 * i + 5, 50))
    ]  # fmt: skip
    trace = trace_of(tmp_path, *events)
    assert list(trace.steps["step"]) == [0, 1]
    assert diagnose.cpu_flame(trace).folded() == "a 100\n"
    assert diagnose.cpu_flame(trace, by_step=True).folded().splitlines()[1] == "ProfilerStep#0;a 50"


def test_a_difference_closes_on_the_wall_clock(tmp_path):
    before = trace_of(tmp_path, event("a", 0, 60), event("b", 10, 20), event("c", 70, 30), name="before.json")
    after = trace_of(tmp_path, event("a", 0, 40), event("d", 5, 10), event("c", 45, 35), name="after.json")
    changed = diagnose.difference(diagnose.cpu_flame(before), diagnose.cpu_flame(after))
    assert changed.change_us == -20
    assert changed.frame["change_us"].sum() == pytest.approx(changed.change_us)
    assert list(changed.of("vanished")["path"]) == [("a", "b")]
    assert list(changed.of("new")["path"]) == [("a", "d")]
    assert list(changed.of("grew")["path"]) == [("c",)]


def test_a_difference_by_name_joins_what_only_stands_elsewhere(tmp_path):
    before = trace_of(
        tmp_path, event("expert", 0, 60), event("block", 0, 50), event("mm", 5, 20), name="b.json"
    )
    after = trace_of(
        tmp_path, event("expert", 0, 50), event("graph", 0, 45), event("mm", 5, 15), name="a.json"
    )
    flames = diagnose.cpu_flame(before), diagnose.cpu_flame(after)
    by_stack, by_name = diagnose.difference(*flames), diagnose.difference(*flames, by="name")
    assert {("expert", "block", "mm"), ("expert", "graph", "mm")} <= set(by_stack.frame["path"])
    rows = {row.path: (row.change_us, row.status) for row in by_name.frame.itertuples()}
    assert rows["expert", "mm"] == (-5, "shrank")
    assert by_name.frame["change_us"].sum() == pytest.approx(by_name.change_us) == pytest.approx(-10)
    figure = plots.difference_icicle(by_stack)
    assert figure.data[0].values[0] == pytest.approx(10 + 30 + 20 + 30 + 15)
    with pytest.raises(WanlabError, match="by is"):
        diagnose.difference(*flames, by="module")


def test_breakdowns_are_compared_row_by_row(tmp_path):
    traces = [
        trace_of(tmp_path, event("expert.mm", 0, n, "user_annotation"), event("aten::mm", 0, n - 10))
        for n in (90, 50)
    ]
    shares = [diagnose.breakdown(trace) for trace in traces]
    changed = diagnose.difference(*shares)
    found = diagnose.profile_answer(shares[0], "", changed)
    assert (
        found.headline
        == changed.headline
        == (
            "The second trace is 44.4 % shorter: 50 µs after 90 µs. Most changed linear layers, by -40 µs. Each was"
            " recorded once, so noise is not known."
        )
    )
    assert found.details[0].startswith("Before: ")
    assert found.next.notebook == "10_baseline"
    assert changed.frame["change_us"].sum() == pytest.approx(changed.change_us) == pytest.approx(-40)
    assert {row.path: row.change_us for row in changed.frame.itertuples()}["linear",] == pytest.approx(-40)
    with pytest.raises(WanlabError, match="one kind"):
        diagnose.difference(diagnose.breakdown(traces[0]), diagnose.cpu_flame(traces[0]))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("aten::mm", "aten::mm"),
        ("void at::native::elementwise_kernel<4, at::native::MulFunctor<float> >(int)", "elementwise_kernel MulFunctor"),
        ("x" * 60, "x" * 23 + "…" + "x" * 23),
    ],
)  # fmt: skip
def test_long_names_are_cut_where_they_say_least(name, short):
    assert plots.short_name(name) == short


def test_speedscope_export_has_what_its_schema_wants(tmp_path):
    flame = diagnose.cpu_flame(trace_of(tmp_path, event("a", 0, 60), event("b;c", 10, 20)))
    profile = flame.speedscope("run")["profiles"][0]
    assert sum(profile["weights"]) == profile["endValue"] == 60
    names = [frame["name"] for frame in flame.speedscope("run")["shared"]["frames"]]
    assert [[names[i] for i in stack] for stack in profile["samples"]] == [["a"], ["a", "b;c"]]
    assert flame.folded().splitlines()[1] == "a;b:c 20"


def test_an_icicle_takes_its_components_colours_and_leaves_out_the_small(tmp_path):
    trace = trace_of(
        tmp_path,
        event("expert_low", 0, 1000, "user_annotation"),
        event("expert_low.blocks.0", 0, 600, "user_annotation"),
        event("aten::mm", 10, 500),
        event("aten::view", 520, 0.2),
    )
    icicle = plots.flame_icicle(diagnose.cpu_flame(trace)).data[0]
    assert list(icicle.labels) == ["all", "expert_low", "blocks.0", "aten::mm"]
    assert set(icicle.marker.colors[1:]) == {plots.COMPONENT_COLOURS["expert_low"]}
    assert icicle.values[0] == 1000


def test_difference_bars_add_up(tmp_path):
    flames = [
        diagnose.cpu_flame(trace_of(tmp_path, *(event(f"f{i}", 10 * i, 1 + (i * k) % 7) for i in range(30))))
        for k in (1, 3)
    ]
    changed = diagnose.difference(*flames)
    bars = plots.difference_bars(changed, rows=5).data[0]
    assert len(bars.x) == 6
    assert sum(bars.x) == pytest.approx(changed.change_us / 1e3)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A small generation of wan-nano: its trace, and the profiler's own table of operators."""
    import torch

    model = models.load("wan-nano", device="cpu")
    image = heldout.example_case().truth()[0]
    settings = {"height": 64, "width": 64, "frames": 5, "steps": 3}
    before = model.generate(image, "the camera pans left", output="latent", **settings).video
    tables = []
    step = torch.profiler.profile.stop

    def stop(profiler):
        step(profiler)
        tables.append(profiler.key_averages())

    torch.profiler.profile.stop = stop
    try:
        path = diagnose.capture(
            model, image, "the camera pans left", tmp_path_factory.mktemp("traces"), **settings
        )
    finally:
        torch.profiler.profile.stop = step
    after = model.generate(image, "the camera pans left", output="latent", **settings).video
    assert (before == after).all(), "the model is as it was"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.pipeline.transformer.modules())
    return diagnose.read_trace(path), tables[-1]


def test_a_capture_names_components_blocks_and_projections(captured):
    names = set(captured[0].events["name"].astype(str))
    for name in (
        "text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder", "expert_low.blocks.3",
        "expert_high.blocks.0.attn1.to_q", "expert_low.blocks.5.ffn", "vae_decoder.up_blocks.0",
    ):  # fmt: skip
        assert name in names
    # The last one holds what comes behind the last denoising step.
    assert len(captured[0].steps) == 4


def test_own_times_are_the_profilers(captured):
    trace, table = captured
    own = diagnose.cpu_flame(trace).own_time().set_index("name")
    for row in sorted(table, key=lambda row: -row.self_cpu_time_total)[:15]:
        if not row.key.startswith("ProfilerStep"):
            assert own.loc[row.key, "self_ms"] * 1e3 == pytest.approx(
                row.self_cpu_time_total, rel=1e-3, abs=5
            )


def test_tensorboard_lists_and_opens_the_run(captured):
    """The real plugin, in its own process, asked over HTTP."""
    folder = captured[0].path.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    plugin = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"
    try:
        runs = asked(f"{plugin}/runs", server, lambda answer: answer["runs"] and not answer["loading"])[
            "runs"
        ]
        views = asked(f"{plugin}/views?run={quote(runs[0])}", server)
        worker = asked(f"{plugin}/workers?run={quote(runs[0])}&view=Overview", server)[0]
        place = f"run={quote(runs[0])}&worker={quote(worker)}"
        span = asked(f"{plugin}/spans?{place}", server)[0]
        overview = asked(f"{plugin}/overview?{place}&span={span}&view=Overview", server)
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert {"Overview", "Operator"} <= set(views)
    assert len(overview["steps"]["rows"]) == len(captured[0].steps)


def asked(url: str, server, ready=bool, wait_s: float = 90.0):
    """The JSON at an address as soon as it is there and ready."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = json.loads(answer.read())
            if ready(content):
                return content
        except urllib.error.HTTPError as error:
            pytest.fail(f"{url}: {error.read().decode()}")
        except OSError:
            pass  # not listening yet
        time.sleep(0.5)
    server.kill()
    pytest.fail(f"no answer from {url}: {server.communicate()[1][-2000:]}")
