"""Readers of pictures and videos on mutated files: success, or one line; a fixed seed."""

from __future__ import annotations

import numpy as np
import pytest
from support.fuzz_media import PARSERS

from wanlab.core.errors import WanlabError


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, name):
    parser, generator = PARSERS[name], np.random.default_rng(16)
    path, said = tmp_path / f"input{parser.suffix}", []
    for index in range(60):
        data = bytearray(parser.seeds[index % len(parser.seeds)])
        for place in generator.integers(0, len(data), generator.integers(0, 6)):
            data[place] = generator.integers(256)
        path.write_bytes(data[: generator.integers(len(data))] if index % 4 == 3 else data)
        try:
            parser.read(path)
        except WanlabError as error:
            said.append(str(error))
    assert 5 < len(said) < 60
    assert not any("\n" in line for line in said)
