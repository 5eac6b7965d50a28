from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from wanlab.core.files import append_bytes, append_json, why, write_json
from wanlab.launch import guard as console
from wanlab.launch import guard as memory
from wanlab.launch import guard as processes
from wanlab.launch import guard as watch
from wanlab.launch.guard import Console, Limits, Watch, reap
from wanlab.runs import folder as folders
from wanlab.runs.folder import Heartbeat, RunFolder, host_id, process_id


@contextmanager
def largest_file(size_bytes):
    """The system writes what fits, and then refuses: as a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def printed(text):
    return {"msg_type": "stream", "content": {"text": text}}


def shown(text):
    return {"msg_type": "display_data", "content": {"data": {"text/html": text}}}


@pytest.fixture
def kept(tmp_path):
    ends = []
    return Console(tmp_path / "console.log", 1.0, lambda *end: ends.append(end)), ends


@pytest.fixture
def heart(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "HEARTBEAT_S", 0.02)
    heart = Heartbeat(RunFolder(tmp_path), kernel=None, progress={"cell": 3})
    yield heart
    heart.end("finished")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MemoryError", ""),
        ("_ArrayMemoryError", "Unable to allocate 8.00 PiB"),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB"),
        ("AcceleratorError", "CUDA error: out of memory"),
        (
            "RuntimeError",
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        ),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("RuntimeException", "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        ("OSError", "[Errno 12] Cannot allocate memory"),
    ],
)
def test_exceptions_for_want_of_memory(name, text):
    assert memory.ran_out(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [("KeyError", "'out of memory'"), ("WanlabError", "give more memory"), ("MemoryErrors", "")],
)
def test_other_exceptions(name, text):
    assert not memory.ran_out(name, text, f"{name}: {text}")


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/user.slice/a\n", "sys/fs/cgroup/user.slice/a/memory.events"),
        ("0::/as/the/host/sees/it\n", "sys/fs/cgroup/memory.events"),
        ("9:cpu:/\n4:memory:/job:1\n0::/\n", "sys/fs/cgroup/memory/job:1/memory.oom_control"),
        ("0::/\n", "proc/vmstat"),
    ],
)
def test_the_systems_count_of_kills(tmp_path, group, file):
    for path, text in (
        ("proc/7/cgroup", group),
        ("proc/vmstat", "nr 1\n"),
        (file, "low 2\noom_kill 3\noom_kill_x 4\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert memory.counter(7, tmp_path) == tmp_path / file
    assert memory.count(tmp_path / file) == 3


def test_no_count_is_not_zero(tmp_path):
    assert memory.counter(7, tmp_path) is None
    assert memory.count(None) is None


def test_full_disk_takes_nothing_back_from_a_file(tmp_path):
    lines, status = tmp_path / "metrics.jsonl", tmp_path / "status.json"
    append_json(lines, {"a": 1})
    write_json(status, {"state": "running"})
    with largest_file(100):
        with pytest.raises(OSError, match="too large") as caught:
            append_json(lines, {"b": "x" * 200})
        assert why(caught.value) == f"file too large: {lines}"
        with pytest.raises(OSError, match="too large") as caught:
            write_json(status, {"b": "x" * 200})
        assert why(caught.value) == f"file too large: {status}"
    append_json(lines, {"c": 3})
    assert [json.loads(line) for line in lines.read_text().splitlines()] == [{"a": 1}, {"c": 3}]
    assert json.loads(status.read_text()) == {"state": "running"}
    assert sorted(tmp_path.iterdir()) == [lines, status]


def test_heartbeat_survives_a_disk_that_is_full_for_a_while(tmp_path, heart):
    told = []
    heart.on_trouble = told.append
    heart.folder.status_json.unlink()
    heart.folder.status_json.mkdir()  # no file can take its place
    wait_until(lambda: told)
    time.sleep(0.1)
    heart.folder.status_json.rmdir()
    wait_until(heart.folder.status_json.is_file)
    assert [why(error) for error in told] == [f"is a directory: {heart.folder.status_json}"]


def test_space_is_held_for_the_last_words(tmp_path):
    run = RunFolder.of(tmp_path, "a", "r").open(reserve=True)
    held = [path.stat() for path in run.path.glob(".*")]
    assert [item.st_size for item in held] == [folders.RESERVE_BYTES]
    assert held[0].st_blocks * 512 >= folders.RESERVE_BYTES
    run.release()
    assert [path.name for path in run.path.iterdir()] == ["artifacts"]


def test_printed_flood_is_cut_once_in_the_notebook(kept):
    taken, ends = kept
    messages = [printed("x" * 150_000) for _ in range(4)]
    assert [taken.keeps(message, 2) for message in messages] == [True, True, False, False]
    assert [len(m["content"]["text"]) < 150_000 for m in messages[:2]] == [False, True]
    assert messages[1]["content"]["text"].endswith("x\n... output continues in console.log\n")
    assert taken.cut == {2}
    assert taken.path.stat().st_size == taken.total_bytes == 600_000
    assert not ends
    for _ in range(10):
        taken.keeps(printed("y" * 150_000), 4)
    assert ends == [("flooded", "wrote 1.1 MiB of output by cell 5, over its limit of 1 MiB")]
    assert taken.path.stat().st_size < 1.1 * 2**20


def test_shown_flood_is_cut_once_in_the_notebook(kept):
    taken, _ = kept
    messages = [shown(str(number)) for number in range(console.RICH_LIMIT + 3)]
    assert [taken.keeps(message, 0) for message in messages].count(True) == console.RICH_LIMIT + 1
    stub = messages[console.RICH_LIMIT]["content"]["data"]
    assert stub == {"text/plain": "... this cell shows more than the notebook keeps"}
    assert taken.cut == {0}


def test_a_live_plot_is_no_flood(kept):
    taken, ends = kept
    for number in range(50):
        taken.cleared(1)
        assert taken.keeps(shown(f"{number} {'x' * 100_000}"), 1)
    assert not ends
    assert not taken.cut


def test_an_exception_is_no_flood(kept):
    taken, _ = kept
    message = {
        "msg_type": "error",
        "content": {"ename": "E", "evalue": "x" * 10**7, "traceback": ["y" * 10**6] * 1000},
    }
    assert taken.keeps(message, 1)
    assert len(json.dumps(message)) < 5 * 2**20


def test_console_that_cannot_be_written_ends_the_run(tmp_path):
    ends = []
    taken = Console(tmp_path, 1.0, lambda *end: ends.append(end))
    assert not taken.keeps(printed("a"), 0)
    assert not taken.keeps(printed("b"), 0)
    assert ends == [("failed", f"is a directory: {tmp_path}")]


def test_watch_ends_what_passes_a_limit(tmp_path, heart, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    (tmp_path / "kernel.log").write_bytes(b"x" * 2**20)
    for limits, log, ending in (
        (Limits(timeout_s=0.1), None, ("timeout", "not done after 0.1 s")),
        (
            Limits(output_mib=0.5),
            "kernel.log",
            ("flooded", "wrote 1 MiB of output by cell 3, over its limit of 0.5 MiB"),
        ),
        (Limits(memory_gib=0.001), None, ("memory", "took 0.1 GiB in cell 3, over its limit of 0.001 GiB")),
    ):
        code = "import subprocess; subprocess.run(['sleep', '604'], start_new_session=True)"
        with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as kernel:
            guard = Watch(heart, limits, tmp_path / log if log else None)
            wait_until(lambda pid=kernel.pid: processes.descendants([pid]))
            (child,) = map(psutil.Process, processes.descendants([kernel.pid]))
            guard.begin(kernel.pid)
            wait_until(lambda guard=guard: guard.ending)
            guard.end("failed", "a later reason does not count")
            guard.close()
            assert kernel.wait(5) == -9
        assert (guard.ending.state, guard.ending.reason) == ending
        assert not processes.alive(child)
        assert heart.fields["processes"] == []


def test_kernel_goes_first_and_keeps_orphans():
    code = """if True:
        import os, subprocess
        from pathlib import Path
        from wanlab.launch.kernel import prepare_process
        before = int(Path("/proc/self/oom_score_adj").read_text())
        prepare_process()
        print(int(Path("/proc/self/oom_score_adj").read_text()) - before)
        pid = subprocess.check_output(["sh", "-c", "sleep 60 >/dev/null & echo $!"], text=True).strip()
        print(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[1] == str(os.getpid()))
        os.kill(int(pid), 9)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["300", "True"]


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"state": "finished"},
        {"writer": process_id(psutil.Process().pid)},
    ],
)
def test_reap_leaves_alone_what_is_not_lost(tmp_path, change):
    with subprocess.Popen(["sleep", "605"]) as kernel:
        dead = {"pid": 2**22 + 7, "started": 1.0}  # above the largest process number
        status = {"state": "running", "host": host_id(), "writer": dead, "kernel": process_id(kernel.pid)}
        run = RunFolder.of(tmp_path, "a", "r").open()
        write_json(run.run_json, {"run_id": "r"})
        write_json(run.status_json, status | change)
        assert reap(tmp_path) == []
        assert kernel.poll() is None
        write_json(run.status_json, status)
        assert reap(tmp_path) == [run.path]
        assert kernel.wait(5) == -9


def test_appending_makes_the_file(tmp_path):
    append_bytes(tmp_path / "a", b"1")
    append_bytes(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"12"
