"""Sessions of ONNX Runtime: provider, options, and one line when they cannot be had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError, did_you_mean, require

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""Graph optimisation: none; folding and dead nodes; also fusions; also the layout of memory."""


def choose_provider(provider: str) -> str:
    """`"cpu"` or `"cuda"` for a name or `"auto"`.

    Raises:
        WanlabError: unknown, not in this ONNX Runtime, or no GPU.
    """
    import torch

    ort = require("onnxruntime", "onnxruntime-gpu")
    available = ort.get_available_providers()
    if provider == "auto":
        return "cuda" if torch.cuda.is_available() and PROVIDERS["cuda"] in available else "cpu"
    if provider not in PROVIDERS:
        raise WanlabError(
            f"unknown provider {provider!r}{did_you_mean(provider, PROVIDERS)};"
            f" give auto, {', '.join(PROVIDERS)}"
        )
    if PROVIDERS[provider] not in available:
        raise WanlabError(
            f"this onnxruntime has no {PROVIDERS[provider]}; add it with: pip install onnxruntime-gpu"
        )
    if provider == "cuda" and not torch.cuda.is_available():
        raise WanlabError("provider is cuda but PyTorch sees no GPU; use provider='cpu'")
    return provider


def open_session(
    path: Path,
    provider: str,
    *,
    threads: int,
    optimization: str,
    stream: int = 0,
    cuda_graph: bool = False,
    profile_prefix: str = "",
    formats: str = "",
) -> Any:
    """An `onnxruntime.InferenceSession` that keeps account of where its nodes run.

    Args:
        stream: `CUstream` that all of its work goes to.
        profile_prefix: where its profile goes when `end_profiling` is called; none when empty.
        formats: that the graph is quantised in, as its metadata says: JSON, format -> layers.

    Raises:
        WanlabError: an option that does not exist, or a graph that cannot be loaded.
    """
    import torch

    ort = require("onnxruntime", "onnxruntime-gpu")
    if optimization not in LEVELS:
        raise WanlabError(
            f"no graph optimisation {optimization!r}{did_you_mean(optimization, LEVELS)};"
            f" give {', '.join(LEVELS)}"
        )
    if threads < 1:
        raise WanlabError(f"threads is {threads}; give 1 or more")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads of one session would otherwise keep a core busy that the next session or torch needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Layers whose weights alone are quantised would otherwise get rounded inputs too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not fuses_codes(formats, provider):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3  # errors only; they come as exceptions as well
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    wanted: list[Any] = [PROVIDERS["cpu"]]
    if provider == "cuda":
        ort.set_default_logger_severity(3)
        ort.preload_dlls()  # CUDA and cuDNN that came with torch
        settings = {
            "device_id": str(torch.cuda.current_device()),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": str(int(cuda_graph)),
            "use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32)),  # as PyTorch beside it
        }
        if stream:
            settings["user_compute_stream"] = str(stream)
        wanted.insert(0, (PROVIDERS["cuda"], settings))
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # onnxruntime has one exception class per failure, without a common base
        raise WanlabError(f"ONNX Runtime cannot load {path.name}: {why(error)}") from error
    if PROVIDERS[provider] not in session.get_providers():
        raise WanlabError(
            f"{PROVIDERS[provider]} did not load for {path.name} (it runs on"
            f" {', '.join(session.get_providers())}); check the CUDA and cuDNN versions or use provider='cpu'"
        )
    return session


def fuses_codes(formats: str, provider: str) -> bool:
    """Whether ONNX Runtime may replace Q/DQ around an operator by one that takes codes.

    Those take integers only. On CUDA there is none that rounds inputs: what is left of the rewriting is biases in int32,
    which only the CPU can decode. Weights alone in codes have theirs on both.
    """
    given = json.loads(formats or "{}")
    return not any("fp8" in name for name in given) and not (provider == "cuda" and "int8" in given)


def why(error: Exception) -> str:
    """What ONNX Runtime says, in its words, or which operator it has no kernel for."""
    text = first_line(error)
    unset = re.search(r"Provider type for (\w+) node with name '([^']*)' is not set", text)
    absent = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", text)
    if found := unset or absent:
        return (
            f"it has no kernel for {found[1]} ({found[2]}) in the type that the graph computes in;"
            " export in float16 or float32"
        )
    return text


def first_line(error: Exception) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
