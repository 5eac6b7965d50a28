"""Module names that engines bury in their layer names: `blocks.7.attn1.to_q`."""

from __future__ import annotations

import re
from collections.abc import Iterable

ROLES = ("attn1", "attn2", "ffn", "norm", "embeddings", "convolution", "reformat_cast", "other", "several")
"""What a layer serves: self-attention, cross-attention, feed-forward, norms and modulation, embeddings and output
projection, convolutions, conversions of dtype or format, nothing that is known, more than one of these."""

_PATTERNS = (
    ("attn2", r"(^|\.)(attn2|cross_attn|EncDecAttention)(\.|$)"),
    ("attn1", r"(^|\.)(attn1?|self_attn|SelfAttention|attention|attentions\.\d+)(\.|$)"),
    ("ffn", r"(^|\.)(ffn?|mlp|DenseReluDense|feed_forward)(\.|$)"),
    ("embeddings", r"(^|\.)(\w*embed\w*|shared|rope|time_proj|proj_out)(\.|$)"),
    ("norm", r"(^|\.)(\w*norm\w*)(\.|$)|^blocks\.\d+$"),
    (
        "convolution",
        r"(^|\.)(conv\w*|resnets\.\d+|(up|down)samplers?(\.\d+)?|(post_)?quant_conv|resample)(\.|$)",
    ),
)
_PARTS = re.compile(r"[^\s+,()\[\]{}\x1e\x1f]+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_WEIGHT = re.compile(r"([A-Za-z_]\w*(\.\w+)*)\.(weight|bias|scale_shift_table)(_\w+)?")
_NODE = re.compile(r"\[([^\[\]]+)\]")


def module_of(node: str) -> str:
    """Module path of an ONNX node's name; empty where it has none.

    `"blocks.0.attn1.to_q/node_linear"` is how wanlab names nodes, and `"/blocks.0/attn1/to_q/MatMul"` how the older
    exporter of PyTorch does. What an engine appends (`.../MatMulAddFusion`) is ignored.
    """
    if node.startswith("/"):
        return ".".join(part for part in node.strip("/").split("/")[:-1] if part)
    head, slash, _ = node.partition("/")
    if not slash:
        found = _WEIGHT.fullmatch(head)
        return found[1] if found else ""
    # `node_view_9/GatherSliceToSplitFusion`, `Transpose_12/...`: a node of no module, extended by the engine
    named = (
        _MODULE.fullmatch(head)
        and not head.startswith("node_")
        and not ("." not in head and head[0].isupper())
    )
    return head if named else ""


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes in the metadata of a TensorRT layer: `"[ONNX Layer: a]\\x1e[ONNX Layer: b]"`."""
    return tuple(
        dict.fromkeys(found.partition("ONNX Layer:")[2].strip() or found for found in _NODE.findall(metadata))
    )


def modules_in(texts: Iterable[str]) -> tuple[str, ...]:
    """Every module named in the names of layers or nodes, in order, each once.

    Takes apart what engines join: `"a/x + b/y"`, `"PWN(a/x, b/y)"`, `"{ForeignNode[a/x...b/y]}"`,
    `"Reformatting CopyNode for Input Tensor 0 to a/x"`.
    """
    found: dict[str, None] = {}
    for text in texts:
        for part in _PARTS.findall(text.replace("...", " ")):
            if module := module_of(part):
                found[module] = None
    # Codes that several layers read are made by nodes of the list that holds them: `blocks` of `blocks.3.attn2.to_k`.
    lists = {
        module for module in found if any(re.match(rf"{re.escape(module)}\.\d", other) for other in found)
    }
    return tuple(module for module in found if module not in lists)


def role_of(modules: Iterable[str], kind: str) -> str:
    """One of `ROLES` for a layer of these modules; conversions are that wherever they stand."""
    if kind in ("cast", "quantize", "reformat", "copy"):
        return "reformat_cast"
    roles = {_role(module) for module in modules}
    if kind == "norm" and "norm" in roles:
        return "norm"  # with the sum before it, and the rounding after it
    if len(roles) > 1:
        # A norm or nothing in particular that was pulled into the work beside it.
        roles = roles - {"norm", "other"} or {"norm"}
    if len(roles) > 1:
        return "several"
    role = next(iter(roles), "other")
    return "convolution" if role == "other" and kind == "conv" else role


def block_of(modules: Iterable[str]) -> int | None:
    """Number of the one block that all modules lie in; None where there is no such block."""
    numbers = {
        int(found[1]) for module in modules if (found := re.match(r"(?:\w+\.)*?blocks?\.(\d+)(\.|$)", module))
    }
    return numbers.pop() if len(numbers) == 1 else None


def site_of(modules: Iterable[str]) -> str:
    """The modules with `*` for their numbers of blocks, which is what layers of all blocks have in common."""
    return ", ".join(dict.fromkeys(re.sub(r"((?:^|\.)blocks?\.)\d+", r"\1*", module) for module in modules))


def _role(module: str) -> str:
    return next((role for role, pattern in _PATTERNS if re.search(pattern, module)), "other")
