"""`wanlab serve` as a process: start and stop, kills, a full disk, and workers on Ray Serve."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import psutil
import pytest
from support.services import MODEL, SLOW, Client

TINY = (
    MODEL,
    "--weights",
    "random",
    "--device",
    "cpu",
    "--size",
    "64x64x9",
    "--any-size",
    "--threads",
    "1",
    "--port",
    "0",
)


@contextlib.contextmanager
def command(root, folder, *more, token="t0ken"):
    """A service that is ready: its process, its URL, and what it printed."""
    environment = {**os.environ, "WANLAB_TOKEN": token, "PYTHONPATH": str(root)}
    line = [sys.executable, "-m", "wanlab.cli", "serve", *TINY, "--folder", str(folder), *more]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    timer = threading.Timer(200, process.kill)
    timer.start()
    try:
        printed = []
        for text in process.stdout:
            printed.append(text)
            if text.startswith("ready: "):
                yield process, text.split()[1].rstrip(","), printed
                break
        else:
            raise AssertionError("".join(printed))
    finally:
        timer.cancel()
        process.terminate()
        printed += process.communicate(timeout=60)[0].splitlines(keepends=True)


def test_it_starts_makes_a_video_and_stops_without_a_trace(root, tmp_path):
    with command(root, tmp_path, "--no-ray", token="") as (process, url, printed):
        token = process.stdout.readline().removeprefix("token: ").strip()  # printed once, as none was given
        assert len(token) >= 32
        with Client(url, token) as client:
            assert client.until(client.accepted())["status"] == "completed"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert printed[-1] == "stopped\n"
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".sqlite", ".lock"}


@pytest.mark.slow
def test_no_accepted_request_is_lost_when_the_process_is_killed(root, tmp_path):
    with command(root, tmp_path, "--no-ray", "--batch", "2") as (process, url, _), Client(url) as client:
        asked = [client.accepted(seed=seed, key=f"{seed}", **SLOW) for seed in range(2)]
        asked += [client.accepted(seed=seed, key=f"{seed}") for seed in range(2, 6)]
        client.until(asked[0], "in_progress")
        process.kill()
        process.wait()
    with command(root, tmp_path, "--no-ray") as (_, url, _), Client(url) as client:
        assert [client.submit(seed=5, key="5").json()["id"]] == asked[5:]
        assert [client.until(identity)["status"] for identity in asked] == ["completed"] * 6


@pytest.mark.slow
def test_a_full_disk_refuses_what_cannot_be_kept_and_goes_on_when_there_is_room(root, tmp_path):
    """A limit of the kernel on the size of files stands for the disk: every write fails, as it does on a full one."""
    with command(root, tmp_path, "--no-ray") as (process, url, _), Client(url) as client:
        before = client.until(client.accepted(seed=1))
        running = client.accepted(seed=2, **SLOW)
        client.until(running, "in_progress")
        _, hard = psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE)
        psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (1, hard))
        refused = client.submit(seed=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        told = client.until(running)
        assert (told["status"], told["error"]["code"]) == ("failed", "storage")
        assert client.video(before["id"]) == before
        assert client.get(f"/v1/videos/{before['id']}/content").status_code == 200
        psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert client.until(client.accepted(seed=3))["status"] == "completed"
        assert client.get("/healthz").status_code == 200
        end = time.monotonic() + 60
        while _status_on_disk(tmp_path, running) != "failed":  # its end is written now
            assert time.monotonic() < end
            time.sleep(0.5)
    assert not list(tmp_path.glob(f"*{running}*"))


def _status_on_disk(folder, identity):
    with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as jobs:
        return jobs.execute("SELECT status FROM jobs WHERE id = ?", (identity,)).fetchone()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0", "--no-token"), "lets everyone in"),
        (("--no-ray", "--replicas", "2"), "one worker"),
        (("--batch", "0"), "max_batch"),
        (("--size", "64x64"), "is no size"),
        (("--no-ray", "--size", "63x64x9"), "multiple"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, commands, arguments, said):
    done = commands.run(["serve", *TINY, "--folder", str(tmp_path), *arguments], cwd=tmp_path)
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr


@pytest.mark.slow
def test_on_ray_a_killed_worker_loses_no_request_and_nothing_is_left(root, tmp_path):
    with command(root, tmp_path, "--batch", "2") as (process, url, _), Client(url) as client:
        alone = client.until(client.accepted(seed=4))
        assert alone["status"] == "completed"
        asked = [client.accepted(seed=seed, **SLOW) for seed in range(2)]
        asked.append(client.accepted(seed=4))
        for identity in asked[:2]:
            client.until(identity, "in_progress")
        started = psutil.Process(process.pid).children(recursive=True)
        workers = [each for each in started if "ServeReplica" in " ".join(each.cmdline())]
        assert len(workers) == 1
        workers[0].kill()
        told = [client.until(identity, seconds=150) for identity in asked]
        assert [(each["status"], each["error"]) for each in told] == [("completed", None)] * 3
        assert (
            told[2]["result"]["frames_sha256"] == alone["result"]["frames_sha256"]
            or told[2]["result"]["mean_batch"] > 1
        )
        running = client.accepted(seed=0, **SLOW)
        client.until(running, "in_progress")
        client.delete(f"/v1/videos/{running}")
        assert client.until(client.accepted(seed=6))["status"] == "completed"
        started = psutil.Process(process.pid).children(recursive=True)
        folders = {
            argument.partition("=")[2]
            for each in started
            for argument in each.cmdline()
            if argument.startswith("--temp")
        }
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    assert folders
    assert not [folder for folder in folders if os.path.exists(folder)]
