"""Where a pipeline calls its components, and how to listen in there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from wanlab.measure.standin import StandIn


def entry_points(pipeline) -> dict[str, dict[str, str]]:
    """Pipeline attribute -> {method: component}, for the components that are there.

    A single transformer is `expert`; of two, `transformer` is `expert_high` and `transformer_2` `expert_low`.
    """
    has = {name for name, value in getattr(pipeline, "__dict__", {}).items() if value is not None}
    high, low = (
        ("expert_high", "expert_low") if {"transformer", "transformer_2"} <= has else ("expert", "expert")
    )
    points = {
        "text_encoder": {"__call__": "text_encoder"},
        "transformer": {"__call__": high},
        "transformer_2": {"__call__": low},
        "vae": {"encode": "vae_encoder", "decode": "vae_decoder"},
    }
    return {name: methods for name, methods in points.items() if name in has}


@contextmanager
def standing_in(pipeline, calls: dict[str, dict[str, Callable]]) -> Iterator[None]:
    """Inside the block the pipeline's attributes are stand-ins, whose methods are wrapped.

    The components themselves are not touched (compiled modules stay compiled).

    Args:
        calls: attribute -> {method: wrapper maker}, as `StandIn` takes it.
    """
    attributes = vars(pipeline)
    with ExitStack() as stack:
        for name, wrappers in calls.items():
            original = attributes[name]
            stack.callback(attributes.__setitem__, name, original)
            # Past the pipeline's own __setattr__, which would write the stand-in to its config.
            attributes[name] = StandIn(original, wrappers)
        yield
