"""Limits on what is read, so that no file can take all of the machine's memory or time.

A user raises them in one way: `WANLAB_LIMITS="axis_values=50000,json_mib=1024"`. Each message of a limit says how.
"""

from __future__ import annotations

import math
import os

from wanlab.core.errors import WanlabError, did_you_mean

VARIABLE = "WANLAB_LIMITS"
LIMITS: dict[str, float] = {
    "axis_values": 10_000,  # values of one axis of a grid
    "depth": 100,  # lists and maps inside one another, in YAML and JSON
    "frame_pixels": 8192 * 4320,  # pixels of one frame of a video
    "json_mib": 256,  # a JSON file, a notebook, or a file of lines of JSON
    "json_objects": 10_000_000,  # objects of a trace or profile; an event is one or two
    "packed_ratio": 100,  # unpacked over packed size of a gzip or zip file; only from 256 MiB on
    "picture_pixels": 150_000_000,  # pixels of one picture
    "runs": 100_000,  # runs of one sweep
    "text_mib": 8,  # a text file: YAML, a prompt
    "trace_mib": 4096,  # a trace, a profile or the layers of an engine, unpacked
    "video_mib": 4096,  # a video whose frames are all held in memory
    "yaml_values": 200_000,  # values of a YAML file, with those that aliases repeat
}
"""Name of a limit -> its default. Sizes are in MiB, the others are counts."""


def limit(name: str) -> float:
    """The limit of a name, from `WANLAB_LIMITS` or its default.

    Raises:
        WanlabError: `WANLAB_LIMITS` names no limit or gives no number above 0.
    """
    chosen = dict(LIMITS)
    for item in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        key, _, text = map(str.strip, item.partition("="))
        if key not in LIMITS:
            hint = did_you_mean(key, LIMITS) or f"; there are {', '.join(LIMITS)}"
            raise WanlabError(f"{VARIABLE} has no limit {key!r}{hint}")
        try:
            chosen[key] = float(text)
        except ValueError:
            chosen[key] = math.nan
        if not chosen[key] > 0:
            raise WanlabError(f"{VARIABLE}: {key}={text!r} is not a number above 0")
    return chosen[name]


def over(name: str, value: float) -> str:
    """The end of a message about a value over its limit; empty where it is not over it.

    `"12,000 is over the limit of 10,000; WANLAB_LIMITS='axis_values=20000' raises it"`
    """
    most = limit(name)
    if value <= most:
        return ""
    unit = " MiB" if name.endswith("_mib") else ""
    value = min(value, 10**15)  # also of an integer beyond floats
    enough = math.ceil(max(value, 2 * most))  # the reader may have stopped at the limit
    return (
        f"{value:,.0f}{unit} is over the limit of {most:,.0f}{unit}; {VARIABLE}='{name}={enough}' raises it"
    )


def check(name: str, value: float, where: str) -> None:
    """Refuse a value over its limit; the message begins with `where`.

    Raises:
        WanlabError: the value is over the limit.
    """
    if words := over(name, value):
        raise WanlabError(f"{where}: {words}")


SEEDS = (-(2**63), 2**64 - 1)
"""Smallest and largest seed that torch takes."""


def check_seed(seed: int) -> int:
    """The seed, if torch takes it.

    Raises:
        WanlabError: it is beyond 64 bits.
    """
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise WanlabError(f"seed {seed} is beyond 64 bits; give one from -2**63 to 2**64 - 1")
    return seed
