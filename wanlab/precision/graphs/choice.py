"""Which layers of a graph get which format: patterns resolved to layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from wanlab.errors import WanlabError
from wanlab.precision.formats import Format, get_format
from wanlab.precision.layers import choose_layers, natural
from wanlab.precision.plans.plan import is_float


def chosen_formats(
    found: Iterable[str],
    layers: str | Sequence[str] | Mapping[str, str | Format] | None,
    format: str | Format | None,
    exclude: str | Sequence[str] = (),
) -> dict[str, Format | str]:
    """Layer -> format, or the name of a float, for the layers asked for, in the order of their names.

    Args:
        found: layers that there are.
        layers, format, exclude: as in `wanlab.precision.quantize`.

    Raises:
        WanlabError: no format or too many, an unknown one, or patterns that match nothing or leave nothing.
    """
    found = list(found)
    if not isinstance(layers, Mapping):
        if format is None:
            raise WanlabError("which format? give format=, or layers= as a mapping from layer to format")
        include = [layers] if layers is None or isinstance(layers, str) else list(layers)
        return dict.fromkeys(_chosen(found, include, exclude), _wanted(format))
    if format is not None:
        raise WanlabError("layers gives a format to each layer already; leave format out")
    by_name: dict[str, Format | str] = {}
    for pattern, name in layers.items():
        by_name |= dict.fromkeys(_chosen(found, [pattern]), _wanted(name))
    return {layer: by_name[layer] for layer in _chosen(found, list(layers), exclude)}


def is_norm(layer: str) -> bool:
    """Whether a layer is a norm, which graphs of the VAE write as a convolution."""
    return layer.rpartition(".")[2].startswith("norm")


def _wanted(format: str | Format) -> Format | str:
    return format if isinstance(format, str) and is_float(format) else get_format(format)


def _chosen(
    found: Sequence[str], include: Sequence[str | None], exclude: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """As `choose_layers`, but norms are taken only by patterns that speak of norms; None is its default."""
    plain = [layer for layer in found if not is_norm(layer)]
    taken = {
        layer
        for pattern in include
        for layer in choose_layers(found if pattern and "norm" in pattern else plain, pattern)
    }
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        taken -= set(choose_layers(found, pattern))
    if not taken:
        raise WanlabError("no layer is left; give patterns that include more or exclude less")
    return tuple(sorted(taken, key=natural))
