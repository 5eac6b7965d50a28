"""To which row of a breakdown an event of the host and a kernel of the GPU belong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from wanlab.diagnose import operators
from wanlab.diagnose.attribution import COMPONENTS, EXPERTS, KINDS, OUTSIDE, SELF, Attribution
from wanlab.diagnose.stacks import NOTHING, launchers
from wanlab.diagnose.trace import RUNTIME_CATEGORIES

if TYPE_CHECKING:
    import numpy as np

    from wanlab.diagnose.trace import Trace

CATEGORIES = (
    "self_attention",
    "cross_attention",
    "linear",
    "norm_modulation_rotary",
    "expert_switching",
    "vae_encoder",
    "vae_decoder",
    "text_encoder",
    "communication",
    "other",
    "host_device_transfer",
    "memory_allocation",
    "launch_and_idle",
)
"""In this order one wins where kernels of several run at the same time."""
WEIGHTS_BYTES = 1 << 20
"""A copy of this size inside an expert swaps in weights: activations do not leave the GPU there."""
INDEX = {name: i for i, name in enumerate(CATEGORIES)}


def category_of(component: np.ndarray, attention: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Category of operators that do work, by where they stand."""
    import numpy as np

    inside = np.select(
        [kind == KINDS.index(operators.ATTENTION), kind == KINDS.index(operators.LINEAR)],
        [
            np.where(np.maximum(attention, SELF) == SELF, INDEX["self_attention"], INDEX["cross_attention"]),
            INDEX["linear"],
        ],
        INDEX["norm_modulation_rotary"],
    )
    whole = {"text_encoder", "vae_encoder", "vae_decoder"}
    by_component = np.array(
        [
            INDEX[name] if name in whole else INDEX["other"] if name == OUTSIDE else NOTHING
            for name in COMPONENTS
        ]
        + [INDEX["other"]]  # component -1
    )
    found = by_component[component]
    return np.where(found == NOTHING, inside, found)


def host_categories(trace: Trace, placed: Attribution) -> np.ndarray:
    """Category of every host event while it is the innermost."""
    found = category_of(placed.component, placed.attention, placed.kind)
    runtime = trace.host["category"].isin(RUNTIME_CATEGORIES).to_numpy()
    own = placed.own_kind
    # Python between operators, and calls that only hand work to the GPU.
    found[own == NOTHING] = INDEX["launch_and_idle"]
    found[placed.selecting] = INDEX["expert_switching"]
    found[own == KINDS.index(operators.ALLOCATION)] = INDEX["memory_allocation"]
    found[runtime & (own == KINDS.index(operators.TRANSFER))] = INDEX["host_device_transfer"]
    return found


def waiting_categories(host_category: np.ndarray) -> np.ndarray:
    """While the GPU waits, an operator on the host is launch overhead, whatever it computes."""
    import numpy as np

    kept = [INDEX[name] for name in ("expert_switching", "host_device_transfer", "memory_allocation")]
    return np.where(np.isin(host_category, kept), host_category, INDEX["launch_and_idle"])


def kernel_categories(trace: Trace, placed: Attribution) -> tuple[np.ndarray, np.ndarray]:
    """Category and component of every kernel."""
    import numpy as np

    kernels = trace.kernels
    launch = launchers(trace.host, kernels)
    known = launch != NOTHING

    def of_launch(values: np.ndarray) -> np.ndarray:
        return np.where(known, np.append(values, NOTHING)[launch], NOTHING)

    names = kernels["name"].cat

    def named(pattern: str) -> np.ndarray:
        return np.array([bool(re.search(pattern, name)) for name in names.categories], dtype=bool)[
            names.codes
        ]

    kind_of_name = np.array([_kind_of_kernel(name) for name in names.categories], dtype=np.int64)[names.codes]
    kind = of_launch(placed.kind)
    # In a compiled region or a graph no operator says what a kernel is; its own name does.
    told = np.isin(kind, (KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)))
    kind = np.where(told, kind, kind_of_name)
    component = of_launch(placed.component)
    if not placed.has_ranges:
        component[:] = COMPONENTS.index("expert")
    category = category_of(component, of_launch(placed.attention), kind)
    category[of_launch(placed.selecting.astype(np.int64)) == 1] = INDEX["expert_switching"]
    copies = named(r"Memcpy (HtoD|DtoH)")
    expert = np.isin(component, [COMPONENTS.index(name) for name in EXPERTS])
    category[copies] = INDEX["host_device_transfer"]
    category[copies & expert & (kernels["size_bytes"].to_numpy() >= WEIGHTS_BYTES)] = INDEX[
        "expert_switching"
    ]
    category[named(r"nccl|Memcpy PtoP")] = INDEX["communication"]
    return category, component


def _kind_of_kernel(name: str) -> int:
    kind = operators.kind(name)
    return KINDS.index(kind if kind in (operators.LINEAR, operators.ATTENTION) else operators.POINTWISE)
