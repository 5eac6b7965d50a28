"""Description of the machine and software that a number was measured on. Only listed fields are read: environment
variables, paths, host and user names are never recorded."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from wanlab.core.paths import CHECKOUT

PACKAGES = (
    "accelerate",
    "apache-tvm",
    "av",
    "diffusers",
    "lpips",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "onnxsim",
    "pandas",
    "papermill",
    "plotly",
    "pycuda",
    "safetensors",
    "scikit-image",
    "stlpips-pytorch",
    "tensorrt",
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "wanlab",
)
# nvidia-smi's name of a value -> wanlab's name
GPU_QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "persistence_mode": "persistence_mode",
}


def environment(device=None) -> dict:
    """Description of the machine and software of this process, as plain data for JSON.

    Args:
        device: device that the numbers are measured on; None takes the GPU when there is one.

    Returns:
        dict: device, gpu (None on a CPU; name, memory_gib, compute_capability, driver and clocks
        where the driver's tool answers), gpu_count, cpu, cores, cores_available, threads, ram_gib,
        platform, python, cuda, packages, git (None outside a source tree; commit, dirty).
    """
    import torch  # imported late: runs are started, compared and plotted without it

    available = torch.cuda.is_available()
    device = torch.device(device or ("cuda" if available else "cpu"))
    on_gpu = device.type == "cuda" and available
    index = device.index
    if on_gpu and index is None:
        index = torch.cuda.current_device()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": device.type,
        "gpu": _gpu(index, torch.cuda.get_device_properties(index)) if on_gpu else None,
        "gpu_count": torch.cuda.device_count() if available else 0,
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "cores_available": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": _packages(),
        "git": _git(),
    }


def hardware() -> dict[str, Any]:
    """The part of `environment` that tells machines apart, without PyTorch: gpu (name of the first), cpu, cores,
    cores_available, ram_gib."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "gpu": _gpu_name(),
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "cores_available": len(affinity(0)) if affinity else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 1024**3, 1),
    }


def _gpu_name() -> str | None:
    """Name of the first GPU that this process may see, from the driver's tool; None without one."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if shown is None else shown.partition(",")[0].strip()
    if first in ("", "-1"):
        return None
    answer = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", first])
    return answer.splitlines()[0].strip() if answer else None


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch := sys.modules.get("torch"):
        versions["torch"] = str(torch.__version__)  # with the build, such as 2.11.0+cu130
    if runtime := sys.modules.get("onnxruntime"):
        versions["onnxruntime imported"] = str(runtime.__version__)  # two wheels install the same package
    return versions


def cpu_model() -> str:
    """Name of the processor, from the operating system."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(index: int, properties: Any) -> dict:
    facts = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 1024**3, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    return facts | _nvidia_smi(getattr(properties, "uuid", None))


def _nvidia_smi(uuid) -> dict:
    """Driver, clocks and power limit of one GPU, found by its id: indices differ when some GPUs are hidden."""
    if uuid is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    answer = _output([*query, "-i", f"GPU-{str(uuid).removeprefix('GPU-')}"])
    values = [value.strip() for value in answer.split(",")] if answer else []
    return {
        name: value if name == "driver" else _number(value)
        for name, value in zip(GPU_QUERY.values(), values, strict=False)
        if value and not value.startswith("[")  # "[N/A]": the driver has no value
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _git() -> dict | None:
    """Commit and state of the source tree that wanlab runs from; None outside a source tree."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None
    commit = _output(["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "-q", "HEAD"])
    status = _output(["git", "-C", str(CHECKOUT), "status", "--porcelain"])
    return {"commit": commit or None, "dirty": None if status is None else bool(status)}


def _output(command: list[str]) -> str | None:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
