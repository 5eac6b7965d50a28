"""What a person sees while a sweep runs: one bar, one line for each running notebook; plain lines in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from wanlab.runs.sweeps.task import Task


class View:
    """Told of every start and end; knows how long runs took and so about how long the rest will.

    Args:
        tasks: all of the sweep. missing: those to run. slots: how many run at a time.
    """

    def __init__(self, name: str, tasks: list[Task], missing: list[Task], slots: int, enabled: bool = True):
        self.total, self.slots, self.enabled = len(missing), slots, enabled
        self.left = {task.run_id: task for task in missing}
        self.took: dict[bool, list[float]] = {False: [], True: []}
        self.begun = time.monotonic()
        self.bar = None
        self.lines: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}
        self.ended_count = 0
        reused = len(tasks) - len(missing)
        if enabled:
            known = f", {reused} finished before" if reused else ""
            print(f"{name}: {self.total} run{'s' * (self.total != 1)}{known}", file=sys.stderr, flush=True)
        if enabled and sys.stderr.isatty() and self.total:
            from tqdm import tqdm

            columns = shutil.get_terminal_size().columns or None
            self.bar = tqdm(
                total=self.total,
                file=sys.stderr,
                ncols=columns,
                bar_format="{bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}",
            )

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        for line in self.lines.values():
            line.close()
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def running(self, task: Task, status: dict[str, Any]) -> None:
        """A run's cell, and how long it has been going."""
        at = status.get("progress") or {}
        where = f"{at.get('title', 'starting')} ({at.get('cell', 0)}/{at.get('of', 0)})"
        if self.bar is None:
            if self.enabled and task.run_id not in self.shown:
                self.shown[task.run_id] = where
                print(f"  started  {task.label}", file=sys.stderr, flush=True)
            return
        line = self.lines.get(task.run_id)
        if line is None:
            from tqdm import tqdm

            used = {other.pos for other in self.lines.values()}
            position = next(p for p in range(1, 10_000) if -p not in used)
            line = self.lines[task.run_id] = tqdm(
                total=None,
                position=position,
                leave=False,
                file=sys.stderr,
                ncols=self.bar.ncols,
                bar_format="  {elapsed} {desc}",
            )
        line.set_description_str(f"{task.label}: {where}")
        self.bar.set_description_str(self.rest())

    def ended(self, task: Task, status: dict[str, Any]) -> None:
        """A run's end: a line in a log, and a line that stays only for what did not finish."""
        self.left.pop(task.run_id, None)
        self.ended_count += 1
        seconds = float(status.get("seconds") or 0.0)
        self.took[task.alone].append(seconds)
        if line := self.lines.pop(task.run_id, None):
            line.close()
        state = status["state"]
        reason = f": {status.get('reason')}" if state != "finished" and status.get("reason") else ""
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_description_str(self.rest())
            if state != "finished":
                self.say(f"{state}  {task.label}{reason}")
        else:
            text = f"[{self.ended_count}/{self.total}] {state} in {seconds:.1f} s  {task.label}{reason}"
            rest = self.rest()
            self.say(f"{text}  ({rest})" if rest else text)

    def rest(self) -> str:
        """`"about 3 min left"`, from the mean of the runs that ended; empty while nothing is known."""
        known = [*self.took[False], *self.took[True]]
        if not known or not self.left:
            return ""
        mean = {alone: sum(times or known) / len(times or known) for alone, times in self.took.items()}
        shared = sum(not task.alone for task in self.left.values())
        seconds = mean[False] * shared / self.slots + mean[True] * (len(self.left) - shared)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
