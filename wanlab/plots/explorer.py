"""The live view of a trace: a widget in Jupyter, and the same view with its data in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from wanlab.core.files import write_bytes
from wanlab.diagnose.explorer.pack import pack
from wanlab.diagnose.explorer.view import CONDITIONS, Exploration
from wanlab.plots.style import CATEGORY_COLOURS, COMPONENT_COLOURS

SCRIPT, STYLE = (Path(__file__).with_name(name) for name in ("explorer.js", "explorer.css"))
MIME = "application/vnd.wanlab.explorer+json"
COLOURS = {"categories": CATEGORY_COLOURS, "components": COMPONENT_COLOURS}


class Explorer(anywidget.AnyWidget):
    """A view of an `Exploration`, from `explorer`.

    Attributes:
        state: what is selected and shown; what is set here is shown, and what is selected in the view becomes `chosen` of
            the exploration.
    """

    _esm = SCRIPT
    _css = STYLE
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, view: Exploration, **state: Any):
        self._view = view
        self._saved: str | None = None  # the data beside the notebook, for its report
        super().__init__(state=state)
        self.on_msg(self._answer)
        self.observe(self._choose, "state")
        self._choose()

    @property
    def selection(self) -> Any:
        """The events that are selected, as a DataFrame."""
        return self._view.selection

    def _choose(self, _: Any = None) -> None:
        self._view.chosen = {
            name: self.state[name] for name in CONDITIONS if self.state.get(name) is not None
        }

    def _answer(self, _: Any, content: Any, __: Any) -> None:
        """A view that was opened asks for the data, which no notebook keeps."""
        if isinstance(content, dict) and content.get("kind") == "ready":
            self.send({"kind": "data"}, buffers=[pack(self._view, colours=COLOURS, compress=False)])

    def save(self, path: Path) -> Path:
        """Write the data for the report; `path` is inside the notebook's run folder, in its `artifacts`."""
        self._saved = f"artifacts/{path.name}"
        return write_bytes(path, pack(self._view, colours=COLOURS))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        shown, *more = bundle if isinstance(bundle, tuple) else (bundle,)
        text = f"Explorer of {len(self._view.events.frame):,} events: open it in Jupyter, or in the run's report."
        shown = {**(shown or {}), "text/plain": text}
        if self._saved:
            shown[MIME] = {"file": self._saved, "state": self.state}
        return (shown, *more) if more else shown


def explorer(view: Exploration, **state: Any) -> Explorer:
    """A live view of an exploration: lanes, breakdown, kernels, calls, roofline and flame graph that follow one selection.

    Args:
        state: what is selected first, as arguments of `Exploration.select`: `component="expert_low"`, `step=3`.
    """
    return Explorer(view, **state)
