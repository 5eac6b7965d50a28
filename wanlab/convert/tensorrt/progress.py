"""A bar while a builder works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wanlab.convert.tensorrt.runtime import Runtime


@contextmanager
def monitor(runtime: Runtime, label: str, progress: bool) -> Iterator[Any]:
    """An `IProgressMonitor` that moves a bar along the outermost phase of a build; None without progress."""
    if not progress or not hasattr(runtime.module, "IProgressMonitor"):
        yield None
        return
    from tqdm.auto import tqdm

    base: Any = runtime.module.IProgressMonitor
    with tqdm(desc=label, unit="step", leave=False) as bar:

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)
                self.outermost = ""

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                if not parent_phase:
                    self.outermost = phase_name
                    bar.reset(total=num_steps)
                bar.set_postfix_str(phase_name, refresh=False)

            def step_complete(self, phase_name: str, step: int) -> bool:
                if phase_name == self.outermost:
                    bar.update(step + 1 - bar.n)
                return True

            def phase_finish(self, phase_name: str) -> None:
                if phase_name == self.outermost:
                    bar.update((bar.total or bar.n) - bar.n)

        yield Monitor()
