"""The number formats that were planned, from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from wanlab.convert.card.files import read_json
from wanlab.errors import WanlabError, require


def read_planned(path: str | os.PathLike | None) -> dict[str, str]:
    """Pattern of module names -> number format, from a file; nothing from None.

    Args:
        path: YAML or JSON of a flat mapping, or the report that wanlab keeps beside a graph that it quantised (the
            graph's name with `.json`).

    Raises:
        WanlabError: no such file, or another content.
    """
    if path is None:
        return {}
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        yaml = require("yaml", "pyyaml")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise WanlabError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    else:
        data = read_json(path)
    if isinstance(data, Mapping) and isinstance(data.get("layers"), list):
        data = {layer["layer"]: layer["format"] for layer in data["layers"] if isinstance(layer, Mapping)}
    if not isinstance(data, Mapping) or not all(isinstance(value, str) for value in data.values()):
        shown = json.dumps({"blocks.*.attn1.to_q": "int8"})
        raise WanlabError(f"{path} is no mapping of module patterns to formats; write {shown}")
    return {str(pattern): value for pattern, value in data.items()}
