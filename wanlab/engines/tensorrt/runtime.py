"""Which TensorRT is here: TensorRT 10 or 11, or TensorRT for RTX, under the names it is installed by."""

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
# NVIDIA's own wheel of libraries comes from its own index; this one is on the ordinary index and holds the same.
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
    """One TensorRT that is loaded.

    Attributes:
        module: with the API of `tensorrt`.
        kind: `"tensorrt"` or `"tensorrt-rtx"`. version: of the library.
        logger: the `ILogger` of everything made with it; TensorRT wants one for the whole process.
        errors: the last ones that it logged.
    """

    module: Any
    kind: Kind
    version: str
    logger: Any
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=20), repr=False)
    _messages: list[list[Message]] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """As a reader knows it."""
        return f"{NAMES[self.kind]} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for GPUs that are not here."""
        return self.kind == "tensorrt-rtx"

    @contextmanager
    def messages(self) -> Iterator[list[Message]]:
        """What is logged meanwhile."""
        kept: list[Message] = []
        self._messages.append(kept)
        try:
            yield kept
        finally:
            # By identity: two lists of messages may be equal.
            self._messages[:] = [other for other in self._messages if other is not kept]

    def last_error(self, log: Sequence[Message] | None = None) -> str:
        """The last error of a log, or of all, without the places of TensorRT's own sources; empty without one."""
        texts = list(self.errors) if log is None else [text for severity, text in log if severity in SEVERE]
        return plain(texts[-1]) if texts else ""


def open_runtime(kind: Kind | None = None) -> Runtime:
    """Load TensorRT.

    Args:
        kind: None takes TensorRT where it is installed and a GPU is seen, else TensorRT for RTX, else TensorRT.

    Raises:
        WanlabError: it is not installed, or its parts do not fit together; says how to add it.
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
    """One for the whole process, by whichever name it was asked for."""
    module = importlib.import_module("tensorrt") if kind == "tensorrt" else _rtx()
    kept: list[list[Message]] = []
    errors: deque[str] = deque(maxlen=20)
    return Runtime(module, kind, module.__version__, _logger(module, kept, errors), errors, kept)


def installed(kind: Kind) -> bool:
    """Whether it can be imported. Type stubs alone, a package without code, do not count."""
    if kind == "tensorrt":
        return _has_code("tensorrt")
    libraries = _has_code("tensorrt_rtx_libs") or _has_code(LIBRARY_PACKAGE)
    return _has_code("tensorrt_rtx") or (_has_code("tensorrt_rtx_bindings") and libraries)


def describe() -> dict[str, str]:
    """Which TensorRT is here, for `wanlab doctor`."""
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
    """A message without the places of TensorRT's own sources."""
    return _SUFFIX.sub("", _CHECK.sub("", _PREFIX.sub("", " ".join(text.split())))).strip()


def _has_code(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _rtx() -> Any:
    if _has_code("tensorrt_rtx"):
        return importlib.import_module("tensorrt_rtx")
    if not _has_code("tensorrt_rtx_libs"):
        libraries = [_library(name) for name in LIBRARIES]
        here = _release(libraries[0].name)
        bindings = importlib.metadata.version("tensorrt-rtx-cu13-bindings")
        if not bindings.startswith(f"{here}."):
            raise WanlabError(
                f"the bindings of TensorRT for RTX are {bindings}, its libraries {here}; make them fit with:"
                f" pip install 'tensorrt-rtx-cu13-bindings=={here}.*'"
            )
        for library in libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def _library(name: str) -> Path:
    spec = find_spec(LIBRARY_PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob(f"{name}.so.*"))]
    if not found:
        raise WanlabError(
            f"{LIBRARY_PACKAGE} has no {name}; reinstall it with: {INSTALL['tensorrt-rtx']} --force-reinstall"
        )
    return max(found, key=lambda path: len(path.name))  # libx.so.1.7.1, not the link libx.so.1


def _release(name: str) -> str:
    """`"1.7.1"` of `libtensorrt_rtx.so.1.7.1`."""
    match = re.search(r"\.so\.([\d.]+)$", name)
    return match[1] if match else ""


def _logger(module: Any, kept: list[list[Message]], errors: deque[str]) -> Any:
    """An `ILogger` that prints nothing and hands every message to the lists in `kept`, errors to `errors` too."""

    base: Any = module.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in SEVERE:
                errors.append(text)
            for messages in kept:
                messages.append((severity.name, text))

    return Logger()
