"""The installed TensorRT (10, 11, or TensorRT for RTX, which have different package names), and its messages."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from wanlab.core.errors import WanlabError, did_you_mean

Kind = Literal["tensorrt", "tensorrt-rtx"]
KINDS: tuple[Kind, ...] = ("tensorrt", "tensorrt-rtx")
NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
INSTALL = {"tensorrt": 'pip install "wanlab[gpu]"', "tensorrt-rtx": 'pip install "wanlab[rtx]"'}
# NVIDIA's own wheel of libraries is on NVIDIA's index; this package on the usual index has the same libraries.
LIBRARY_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARIES = ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx")

# "IBuilder::…: Error Code 1: Myelin ([pass.cpp:347: check] Cannot compile … . In compileGraph at /_src/…:2012)"
_PREFIX = re.compile(r"^.*?Error Code \d+: [\w ]*\((?:\[[^\]]*\] ?)?|^\[[^\]]*\] ?(?:Error Code \d+: )?")
_CHECK = re.compile(r"^Myelin\w+: \S+:\d+: CHECK\(.*?\) failed\. ")
_SUFFIX = re.compile(r"\.? \(See https?://.*$|\.? In \w+ at \S+\)?\s*$|\)\s*$")
SEVERE = ("INTERNAL_ERROR", "ERROR")
Message = tuple[str, str]
"""Severity as TensorRT names it (`"ERROR"`, `"WARNING"`, `"INFO"`, …) and text."""


@dataclass(frozen=True, eq=False)
class Runtime:
    """A loaded TensorRT.

    Attributes:
        module: module with the API of `tensorrt`.
        kind: `"tensorrt"` or `"tensorrt-rtx"`.
        version: version of the library.
        logger: the `ILogger` of all its objects; TensorRT needs one logger for the whole process.
        errors: last errors that were logged.
    """

    module: Any
    kind: Kind
    version: str
    logger: Any
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=20), repr=False)
    _messages: list[list[Message]] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """Name and version for readers."""
        return f"{NAMES[self.kind]} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for GPUs that are not in this machine."""
        return self.kind == "tensorrt-rtx"

    @contextmanager
    def messages(self) -> Iterator[list[Message]]:
        """Messages that are logged inside the block."""
        log: list[Message] = []
        self._messages.append(log)
        try:
            yield log
        finally:
            # By identity: two lists of messages may be equal.
            self._messages[:] = [other for other in self._messages if other is not log]

    def last_error(self, log: Sequence[Message] | None = None) -> str:
        """The last error of a log, or of all messages, without positions in TensorRT's source code; empty without one."""
        texts = list(self.errors) if log is None else [text for severity, text in log if severity in SEVERE]
        return plain(texts[-1]) if texts else ""


def open_runtime(kind: Kind | None = None) -> Runtime:
    """Load TensorRT.

    Args:
        kind: None takes TensorRT where it is installed and a GPU is seen, else TensorRT for RTX, else TensorRT.

    Raises:
        WanlabError: it is not installed, or the versions of its parts differ; the message says how to install it.
    """
    if kind is not None and kind not in KINDS:
        raise WanlabError(
            f"no TensorRT is called {kind!r}{did_you_mean(kind, KINDS)}; give {' or '.join(KINDS)}"
        )
    if kind is None:
        kinds = KINDS if torch.cuda.is_available() else tuple(reversed(KINDS))
        kind = next((one for one in kinds if installed(one)), None)
        if kind is None:
            raise WanlabError(f"no TensorRT is installed; add it with: {INSTALL[kinds[0]]}")
    if not installed(kind):
        raise WanlabError(f"{NAMES[kind]} is not installed; add it with: {INSTALL[kind]}")
    return _opened(kind)


@cache
def _opened(kind: Kind) -> Runtime:
    """The runtime of a kind; one for the whole process."""
    module = importlib.import_module("tensorrt") if kind == "tensorrt" else _rtx()
    logs: list[list[Message]] = []
    errors: deque[str] = deque(maxlen=20)
    return Runtime(module, kind, module.__version__, _logger(module, logs, errors), errors, logs)


def installed(kind: Kind) -> bool:
    """Whether a kind can be imported. Type stubs alone, a package without code, do not count."""
    if kind == "tensorrt":
        return _has_code("tensorrt")
    libraries = _has_code("tensorrt_rtx_libs") or _has_code(LIBRARY_PACKAGE)
    return _has_code("tensorrt_rtx") or (_has_code("tensorrt_rtx_bindings") and libraries)


def describe() -> dict[str, str]:
    """Installed versions of TensorRT, for `wanlab doctor`."""
    rows = {}
    if installed("tensorrt"):
        rows["TensorRT"] = f"{_version('tensorrt')}, builds on the GPU that will run the engine"
    if installed("tensorrt-rtx"):
        version = _version("tensorrt-rtx-cu13-bindings") or _version("tensorrt-rtx")
        rows["TensorRT for RTX"] = f"{version}, builds for RTX GPUs on any machine"
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def plain(text: str) -> str:
    """A message without positions in TensorRT's source code."""
    return _SUFFIX.sub("", _CHECK.sub("", _PREFIX.sub("", " ".join(text.split())))).strip()


def _has_code(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _rtx() -> Any:
    if _has_code("tensorrt_rtx"):
        return importlib.import_module("tensorrt_rtx")
    if not _has_code("tensorrt_rtx_libs"):
        libraries = [_library(name) for name in LIBRARIES]
        release = _release(libraries[0].name)
        bindings = importlib.metadata.version("tensorrt-rtx-cu13-bindings")
        if not bindings.startswith(f"{release}."):
            raise WanlabError(
                f"the bindings of TensorRT for RTX are {bindings}, its libraries {release}; install the same release with:"
                f" pip install 'tensorrt-rtx-cu13-bindings=={release}.*'"
            )
        for library in libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def _library(name: str) -> Path:
    spec = find_spec(LIBRARY_PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [path for folder in folders for path in sorted(folder.glob(f"{name}.so.*"))]
    if not files:
        raise WanlabError(
            f"{LIBRARY_PACKAGE} has no {name}; reinstall it with: {INSTALL['tensorrt-rtx']} --force-reinstall"
        )
    return max(files, key=lambda path: len(path.name))  # libx.so.1.7.1, not the link libx.so.1


def _release(name: str) -> str:
    """Release in the name of a library: `"1.7.1"` for `libtensorrt_rtx.so.1.7.1`."""
    match = re.search(r"\.so\.([\d.]+)$", name)
    return match[1] if match else ""


def _logger(module: Any, logs: list[list[Message]], errors: deque[str]) -> Any:
    """An `ILogger` that prints nothing: it adds every message to the lists in `logs`, and errors also to `errors`."""

    base: Any = module.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in SEVERE:
                errors.append(text)
            for messages in logs:
                messages.append((severity.name, text))

    return Logger()
