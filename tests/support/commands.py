"""`wanlab` commands without their start-up time: forked from a process that has imported what notebooks need.

The imports of `wanlab run` and of its kernel (torch, pandas, IPython, diffusers) take several times longer than a small
notebook. As in a sweep (`wanlab.launch.prefork`) they are done once; each command is a fork that runs `wanlab.cli.main` with
its own arguments, environment, folder, output and session, and whose kernel is a fork too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# What notebooks import beside `wanlab.launch.prefork.MODULES`; as far as it is there.
MODULES = (
    "wanlab.cli.main",
    "av",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "onnx",
    "onnxscript",
    "scipy.stats",
    "skimage.metrics",
    "torch.onnx._internal.exporter._core",
    "transformers.models.umt5.modeling_umt5",
    "wanlab.diagnose.breakdown",
    "wanlab.engines.pipeline",
    "wanlab.evaluate.quality",
    "wanlab.export.export",
    "wanlab.heldout.cases",
    "wanlab.measure.baseline",
    "wanlab.models.loading",
    "wanlab.models.pipeline",
    "wanlab.plots.runs",
    "wanlab.precision.qdq",
)


class Commands:
    """Starts commands of `wanlab` as forks of one warm process, which starts with the first of them.

    Args:
        root: the project.
        folder: for the output of commands.
    """

    def __init__(self, root: Path, folder: Path):
        self._root, self._folder = root, folder
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()

    def run(
        self,
        arguments: Iterable[str | os.PathLike[str]],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run([python, "-m", "wanlab.cli", *arguments], text=True, capture_output=True)` gives.

        Raises:
            subprocess.TimeoutExpired: the command was killed after `timeout_s`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        out, err = (self._folder / f"{next(self._numbers)}.{name}" for name in ("out", "err"))
        argv = [os.fspath(argument) for argument in arguments]
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ if env is None else env)
        environment["PYTHONPATH"] = str(self._root)
        order = {"argv": argv, "cwd": str(cwd), "env": environment, "out": str(out), "err": str(err)}
        server = self._started()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(order).encode() + b"\n")
        server.stdin.flush()
        pid = json.loads(server.stdout.readline())["pid"]
        deadline = time.monotonic() + timeout_s
        # The answer with its exit status follows; a command that never ends is killed, and then it follows too.
        os.set_blocking(server.stdout.fileno(), False)
        line, late = b"", False
        while not line.endswith(b"\n"):
            line += server.stdout.readline() or b""
            if not late and time.monotonic() > deadline:
                late = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            assert server.poll() is None, "the process that starts commands is gone"
            time.sleep(0.02)
        os.set_blocking(server.stdout.fileno(), True)
        if late:
            raise subprocess.TimeoutExpired(argv, timeout_s, out.read_text(), err.read_text())
        code = json.loads(line)["code"]
        return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin
            self._server.stdin.close()
            self._server.wait(30)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            environment = (
                threads | os.environ | {"PYTHONPATH": str(self._root), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
            )
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=self._root,
            )
        return self._server


def serve() -> None:
    """The warm process: one command a line, answered by its process id and, when it has ended, its exit status."""
    from wanlab.launch.kernel import die_with_parent
    from wanlab.launch.prefork import preload

    die_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)
    preload()
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    if threading.active_count() != 1:
        raise SystemExit(
            f"threads after the imports: {threading.enumerate()}; a process with threads must not fork"
        )
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            os.close(answers)
            _become(**order)
        os.write(answers, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(answers, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _become(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """The fork: one command, from its output files to its exit status."""
    from wanlab.cli.main import main
    from wanlab.launch.kernel import die_with_parent
    from wanlab.launch.prefork import fork_kernel

    code: object = 1
    try:
        os.setsid()
        die_with_parent()
        for name, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
            file = os.open(name, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if descriptor else 0), 0o666)
            os.dup2(file, descriptor)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        sys.argv = ["wanlab", *argv]
        fork_kernel()
        code = main(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
