"""Mutated inputs for every parser, some of them here; `make fuzz` tries 10,000 of each."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from support.fuzz import Parser, fuzz
from support.fuzz_parsers import PARSERS

from wanlab.core.errors import WanlabError

INPUTS = 30


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_reads_or_refuses_in_one_line(name):
    found = fuzz(name, PARSERS[name], 0, INPUTS)
    assert found.failures == {}
    assert found.read
    assert found.read + found.refused == INPUTS


def test_the_same_number_is_the_same_input():
    parser = PARSERS["plan"]
    assert [parser.input("plan", number) for number in range(50)] == [
        parser.input("plan", number) for number in range(50)
    ]
    assert len({parser.input("plan", number) for number in range(50)}) > 40


def misbehave(path):
    """Read the seed; at the other inputs hang, take memory, raise, end the process, refuse in two ways."""
    what = path.read_bytes()
    if what == b"hang":
        time.sleep(60)
    if what == b"take":
        return b"\1" * 2**26
    if what == b"eat":
        return [bytearray(2**24) for _ in range(1000)]
    if what == b"end":
        os._exit(3)
    if what == b"raise":
        json.loads("{")
    if what == b"lines":
        raise WanlabError("one\ntwo")
    if what == b"refuse":
        raise WanlabError("one line")
    return None


def test_hangs_bombs_and_ends_are_found_with_their_inputs(monkeypatch):
    for name, limit in {"LIMIT_BYTES": 2**25, "ADDRESS_BYTES": 2**27}.items():
        monkeypatch.setattr(f"support.fuzz.{name}", limit)
    seeds = (b"read", b"hang", b"take", b"eat", b"end", b"raise", b"refuse", b"lines")
    found = fuzz("misbehaving", Parser(seeds, misbehave), 0, len(seeds))
    assert any(
        re.fullmatch(r"no end after 5 s in .*test_fuzzing.py:\d+ misbehave", end) for end in found.failures
    )
    ends = {
        seeds[number].decode(): end.split(":")[0].split(" in ")[0]
        for end, numbers in found.failures.items()
        for number in numbers
    }
    assert ends == {
        "hang": "no end after 5 s",
        "take": "took more than 32 MiB",
        "eat": "MemoryError",
        "end": "the process ended",
        "raise": "JSONDecodeError",
    }
    assert (found.read, found.refused) == (1, 2)
