"""What a warm start does once so that no run has to: imports, and the first drawing of a figure and a page."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable

# What the supervisor, a kernel and most notebooks import.
MODULES = (
    "wanlab.runs.execute",
    "wanlab.runs.supervise",
    "wanlab.runs.sweeps.worker",
    "wanlab.measure.environment",
    "papermill",
    "psutil",
    "ipykernel.debugger",
    "ipykernel.kernelapp",
    "IPython.core.completerlib",
    "IPython.extensions.storemagic",
    "tornado.platform.asyncio",
    "pandas.io.formats.html",
    "plotly.io",
    "torch",
)


def prime(more: Iterable[str] = ()) -> None:
    """Import `MODULES` and `more` as far as they are there; then draw a bar and a page, which fills caches."""
    for name in (*MODULES, *more):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import pandas as pd
    import plotly.graph_objects as go

    from wanlab.runs.notebook_format import nbformat
    from wanlab.runs.pages.report import page_of

    v4 = nbformat.v4
    figure = go.Figure([go.Bar(x=[1], y=[1]), go.Scatter(x=[1], y=[1])])
    shown = {
        "application/vnd.plotly.v1+json": figure.to_plotly_json(),
        "text/html": pd.DataFrame({"a": [1.0]})._repr_html_(),
    }
    outputs = [v4.new_output("display_data", data={kind: data}) for kind, data in shown.items()]
    outputs.append(v4.new_output("stream", text="\x1b[1mtext"))
    cells = [v4.new_markdown_cell("# Title\n\n- text"), v4.new_code_cell("x = 1", outputs=outputs)]
    page_of(v4.new_notebook(cells=cells), {}, {}, None, "page")
