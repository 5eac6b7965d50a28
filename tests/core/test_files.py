"""Files are written whole or not at all, and drafts do not pile up."""

from __future__ import annotations

import subprocess
import sys

from wanlab.core.files import atomic_path, write_text


def test_the_draft_of_a_killed_writer_goes_with_the_next_one(tmp_path):
    killed = """
import os, sys
from wanlab.core.files import atomic_path
with atomic_path(sys.argv[1]) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", killed, tmp_path / "a.txt"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "a.txt") as mine:  # of a living writer, which another leaves alone
        mine.write_text("first")
        assert len(list(tmp_path.iterdir())) == 1
        write_text(tmp_path / "a.txt", "second")
        assert mine.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first"
