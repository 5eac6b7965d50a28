"""Mutated inputs for every parser: a parser reads each, or refuses it with one line, in little time and memory.

    PYTHONPATH=tests python -m support.fuzz --inputs 10000 --json data/results/fuzzing_cpu.json

Each input is made from a parser's own seeds by a random generator whose seed is the parser's name and the input's number, so
that one number gives the same input again (`--parser grid --first 4711 --inputs 1`). Inputs run in forks of a process that
has imported everything: a fork has a limit of memory, its parent one of time, so a hang or a bomb ends the fork and not the
search. The mutator is our own: hypothesis makes values from strategies and not from files that real programs wrote, and
atheris needs Python built for coverage.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wanlab.core.errors import WanlabError

LIMIT_S, LIMIT_BYTES = 5.0, 2**30
ADDRESS_BYTES = 4 * 2**30  # of addresses, which pools of memory take without using them
STACK = "stack.txt"
BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xe9",
    b"\x1b[2J",
    b"\r",
    b"\n\n",
    b"\t",
    b"\\",
    b'"',
    b"\xed\xa0\x80",
]
TOKENS = [
    *(
        "null",
        "true",
        "false",
        "-1",
        "0",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "1e-320",
        "99999999999999999999",
        "-9" * 30,
    ),
    *(
        '""',
        "''",
        "[]",
        "{}",
        "[[]]",
        '{"a": 1}',
        "[1, [2, [3]]]",
        "[" * 300,
        "{a: " * 150,
        "1" * 5000,
        '"\\ud800"',
        '"\\u0000"',
    ),
    *(
        "2026-99-99",
        "0x1f",
        "010",
        "yes",
        "~",
        ".nan",
        "*a",
        "&a [*a]",
        "<<: *a",
        "!!int x",
        "!!binary x",
        "? [a]",
        "- ",
        ": ",
    ),
    *(
        "..",
        "../x",
        "/",
        "a" * 5000,
        "%s",
        "{0}",
        "None",
        "()",
        "=",
        "#",
        ",",
        "\u202e",
        "日本",
        "\u2028",
        "1_000",
        "12:30",
    ),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        1e300,
        -1e-300,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
        10**400,
        float("inf"),
        float("nan"),
    ),
    *("", "x", "\ud800", "\x1b[2J", "../x", "a" * 3000, "NaN", "1e3", "日本", "\0", "int8", "cuda"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["x"] * 300, [1, "a", None]),
]
TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[-+.\w]+|\s+|[^\w\s]')


@dataclass(frozen=True, eq=False)
class Parser:
    """One parser: inputs that it reads, and how it is called with a file.

    Attributes:
        seeds: contents of small files that it reads.
        read: reads the file at a path.
        name: the file's name, with the ending that the parser asks for.
        kind: `"text"`, `"json"`, `"lines"` (of JSON) or `"bytes"`: which mutations make sense.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    name: str = "input"
    kind: str = "text"

    def input(self, name: str, number: int) -> bytes:
        """Input `number` of the parser called `name`; the first are the seeds themselves."""
        if number < len(self.seeds):
            return self.seeds[number]
        draw = random.Random(f"{name} {number}")
        data = draw.choice(self.seeds)
        for _ in range(1 + min(draw.getrandbits(8).bit_length() % 4, 3)):
            data = draw.choice(MUTATIONS[self.kind])(draw, data, self.seeds)[: 2**20]
        return data


def flip(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Change single bytes."""
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] = draw.getrandbits(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Leave out a part, or all after a place."""
    first = draw.randrange(len(data) + 1)
    return data[:first] + (b"" if draw.random() < 0.3 else data[first + draw.randrange(1, 200) :])


def repeat(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Write a part several times."""
    first = draw.randrange(len(data) + 1)
    part = data[first : first + draw.randrange(1, 100)]
    return data[:first] + part * draw.choice((2, 3, 200)) + data[first:]


def insert(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Add bytes that encodings and terminals take for something else."""
    first = draw.choice((0, draw.randrange(len(data) + 1)))
    return data[:first] + draw.choice(BYTES) + data[first:]


def splice(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """The beginning of one file and the end of another."""
    other = draw.choice(seeds)
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


def encode(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """The same text in another encoding."""
    return data.decode("utf-8", "replace").encode(
        draw.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32")), "replace"
    )


def swap_tokens(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Replace, exchange, leave out or repeat words."""
    words = TOKEN.findall(data.decode("utf-8", "replace")) or [""]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, other = draw.randrange(len(words)), draw.randrange(len(words))
        words[at] = draw.choice(
            (draw.choice(TOKENS), draw.choice(TOKENS), words[other], "", (words[at] * 50)[:50_000])
        )
    return "".join(words).encode("utf-8", "replace")


def swap_types(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Replace values of JSON by others, leave them out, or move them."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return swap_tokens(draw, data, seeds)
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return json.dumps(draw.choice(VALUES)).encode()
        holder, key = draw.choice(places)
        other, name = draw.choice(places)
        if draw.random() < 0.15:
            holder.pop(key)
        elif draw.random() < 0.2 and isinstance(holder, dict):
            holder[draw.choice(TOKENS)] = holder.pop(key)
        else:
            new = draw.choice((*[draw.choice(VALUES)] * 3, other[name], {"a": holder[key]}))
            holder[key] = copy.deepcopy(new)  # not the value itself, which could then contain itself
    return json.dumps(value).encode()


def swap_lines(draw: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """`swap_types` of one line of several."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = swap_types(draw, lines[at], seeds)
    return b"\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in lists and dicts: the holder, and the key or index."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        ):
            yield holder, key
            waiting.append(holder[key])


ANY = [flip, cut, repeat, insert, splice]
MUTATIONS: dict[str, list[Callable[[random.Random, bytes, tuple[bytes, ...]], bytes]]] = {
    "bytes": [flip, flip, flip, *ANY],
    "text": [*[swap_tokens] * 6, encode, *ANY],
    "json": [*[swap_types] * 8, *[swap_tokens] * 2, encode, *ANY],
    "lines": [*[swap_lines] * 8, *[swap_tokens] * 2, encode, *ANY],
}


@dataclass
class Found:
    """What the inputs of one parser came to.

    Attributes:
        failures: end (an exception and its place, a hang, a signal) -> numbers of the inputs.
    """

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        failed = sum(map(len, self.failures.values()))
        return {
            "inputs": self.read + self.refused + failed,
            "read": self.read,
            "refused": self.refused,
            "failed": failed,
            "slowest_s": round(self.slowest_s, 3),
            "peak_mib": round(self.peak_bytes / 2**20),
        }


def fuzz(name: str, parser: Parser, first: int, last: int, bar: Any = None) -> Found:
    """Inputs `first` to `last - 1` of one parser, in forks of this process."""
    found, number = Found(), first
    while number < last:
        number = _fork(name, parser, number, last, found, bar)
    return found


def _fork(name: str, parser: Parser, first: int, last: int, found: Found, bar: Any) -> int:
    """Run inputs in one fork until all are done or one ends it; returns the number of the next input."""
    clock = mmap.mmap(-1, 16)  # number of the input, and when it began
    clock[:16] = struct.pack("qd", first, time.monotonic())
    receive, send = os.pipe()
    with tempfile.TemporaryDirectory(prefix="wanlab-fuzz-") as folder:
        pid = os.fork()
        if not pid:
            os.close(receive)
            _work(name, parser, first, last, clock, send, Path(folder))
        os.close(send)
        with os.fdopen(receive, "rb", buffering=0) as answers:
            os.set_blocking(receive, False)
            done, number, hung, text = False, first, False, b""
            while not done:
                done = os.waitpid(pid, os.WNOHANG)[0] == pid
                text += answers.read(2**20) or b""
                *lines, text = text.split(b"\n")
                for line in lines:
                    number = _count(json.loads(line), found) + 1
                    if bar is not None:
                        bar.update()
                at, begun = struct.unpack("qd", clock[:16])
                if not done and time.monotonic() - begun > LIMIT_S:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    done, hung, number = True, True, at
                elif not done:
                    time.sleep(0.01)
        if number == last:
            return number
        end = f"no end after {LIMIT_S:g} s{_place(Path(folder) / STACK)}" if hung else "the process ended"
    found.failures.setdefault(end, []).append(number)
    if bar is not None:
        bar.update()
    return number + 1


def _place(stack: Path) -> str:
    """`" in file:line name"` of the innermost frame that faulthandler wrote shortly before the limit."""
    frame = re.search(r'File "(.+)", line (\d+) in (.+)', stack.read_text().rpartition("Timeout")[2])
    return f" in {frame[1].rsplit('/wanlab/', 1)[-1]}:{frame[2]} {frame[3]}" if frame else ""


def _count(answer: dict[str, Any], found: Found) -> int:
    found.slowest_s = max(found.slowest_s, answer["s"])
    found.peak_bytes = max(found.peak_bytes, answer["bytes"])
    if answer["end"] == "read":
        found.read += 1
    elif answer["end"] == "refused":
        found.refused += 1
    else:
        found.failures.setdefault(answer["end"], []).append(answer["number"])
    return answer["number"]


def _work(
    name: str, parser: Parser, first: int, last: int, clock: mmap.mmap, send: int, folder: Path
) -> None:
    """The fork: never returns."""
    with contextlib.suppress(BaseException), (folder / STACK).open("w") as stack:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, size + ADDRESS_BYTES))
        path = folder / parser.name
        for number in range(first, last):
            data = parser.input(name, number)
            path.write_bytes(data)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; see proc(5)
            before, begun = _memory("VmRSS"), time.monotonic()
            clock[:16] = struct.pack("qd", number, begun)
            faulthandler.dump_traceback_later(0.8 * LIMIT_S, file=stack)
            end = _end_of(parser.read, path)
            faulthandler.cancel_dump_traceback_later()
            seconds = time.monotonic() - begun
            peak = _memory("VmHWM") - before
            if peak > LIMIT_BYTES and end in ("read", "refused"):
                end = f"took more than {LIMIT_BYTES // 2**20} MiB"
            answer = {"number": number, "end": end, "s": seconds, "bytes": peak}
            os.write(send, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _memory(name: str) -> int:
    """Bytes of this process: `"VmRSS"` in RAM now, `"VmHWM"` the most so far."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def _end_of(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except WanlabError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"several lines: {str(error)[:80]!r}"
    except BaseException as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/wanlab/" in frame.filename]
        place = own[-1] if own else traceback.extract_tb(error.__traceback__)[-1]
        where = place.filename.rsplit("/wanlab/", 1)[-1]
        return f"{type(error).__name__} in {where}:{place.lineno} {place.name}: {str(error)[:80]}".replace(
            "\n", " "
        )
    return "read"


def main() -> int:
    from support.fuzz_parsers import PARSERS
    from wanlab.core.files import plain, write_json
    from wanlab.measure.environment import environment

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--inputs", type=int, default=10_000, help="inputs of each parser (default: %(default)s)"
    )
    options.add_argument("--first", type=int, default=0, help="number of the first input")
    options.add_argument("--parser", action="append", choices=PARSERS, help="only this one; repeatable")
    options.add_argument("--json", type=Path, help="where the figures are written")
    options.add_argument(
        "--keep", type=Path, default=Path("outputs/fuzz"), help="folder of the inputs that fail"
    )
    asked = options.parse_args()
    rows, begun = {}, time.monotonic()
    for name in asked.parser or PARSERS:
        with tqdm(total=asked.inputs, desc=f"{name:22}", file=sys.stderr, mininterval=1.0) as bar:
            found = fuzz(name, PARSERS[name], asked.first, asked.first + asked.inputs, bar)
        rows[name] = found.row()
        for end, numbers in found.failures.items():
            kept = asked.keep / f"{name}-{numbers[0]}-{PARSERS[name].name}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(PARSERS[name].input(name, numbers[0]))
            print(f"{name}: {len(numbers)} times: {end}: {kept}", flush=True)
        print(name, json.dumps(rows[name]), flush=True)
    if asked.json:
        limits = {"limit_s": LIMIT_S, "limit_mib": LIMIT_BYTES // 2**20}
        record = {
            "seconds": round(time.monotonic() - begun),
            **limits,
            "parsers": rows,
            "environment": plain(environment()),
        }
        write_json(asked.json, record)
    return int(any(row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
