"""What this machine and this installation have, and how to get what is missing.

Nothing here needs a GPU, a compiler, triton or the native module: each absence is a finding.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import _native
from .ops._backends import outdated_driver

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "rich",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "pytest",
    "pytest-benchmark",
)
_TOOLS = ("g++", "c++", "nvcc", "ninja")


def collect() -> dict[str, Any]:
    """Versions, CPU, GPUs, tools and backends, as plain data that `json` can write."""
    return {
        "versions": _versions(),
        "system": {"os": platform.platform(), "machine": platform.machine()},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "tools": {tool: _tool_version(tool) for tool in _TOOLS},
        "backends": _backends(),
    }


def as_text(found: dict[str, Any]) -> str:
    """`collect()` for people: one aligned line per finding, remedies under what is missing."""
    lines: list[str] = []

    def section(title: str, items: dict[str, Any]) -> None:
        lines.append(title)
        width = max(map(len, items), default=0)
        lines.extend(f"  {name:<{width}}  {_shown(value)}" for name, value in items.items())
        lines.append("")

    section("versions", found["versions"])
    section("system", found["system"])
    section("cpu", found["cpu"])
    gpu = found["gpu"]
    section("gpu", {**gpu, "devices": [_device_line(d) for d in gpu["devices"]]})
    section("tools", found["tools"])
    lines.append("backends")
    for name, backend in found["backends"].items():
        if backend["usable"]:
            lines.append(f"  {name:<10} usable: {backend['detail']}")
        else:
            lines.append(f"  {name:<10} not usable: {backend['detail']}")
            lines.append(f"  {'':<10} to get it: {backend['remedy']}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "not found"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fusedattn", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    # The wheel's metadata drops the build ("+cpu", "+cu128") that says which torch this is.
    found["torch"] = str(torch.__version__)
    return found


# --- hardware and tools --------------------------------------------------------------------------


def _cpu() -> dict[str, Any]:
    native = _native.cpu
    return {
        "model": _cpu_model(),
        "cores": _usable_cores(),
        "threads of torch": torch.get_num_threads(),
        "OpenMP threads": None if native is None else native.openmp_threads(),
        "torch runs": torch.backends.cpu.get_cpu_capability(),
        "instruction sets": None if native is None else list(native.instruction_sets()),
    }


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return _first_line_of(["sysctl", "-n", "machdep.cpu.brand_string"]) or "unknown"
    return platform.processor() or "unknown"


def _gpu() -> dict[str, Any]:
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {
        "devices": devices,
        "CUDA of torch": torch.version.cuda,
        "HIP of torch": torch.version.hip,
    }


def _device_line(device: dict[str, Any]) -> str:
    memory = device["memory_bytes"] / 2**30
    return f"{device['name']} (sm {device['capability']}, {memory:.0f} GiB)"


def _tool_version(tool: str) -> str | None:
    """The path of a tool and the line of its `--version` that has a number in it."""
    path = shutil.which(tool)
    if path is None:
        return None
    line = _first_line_of([path, "--version"], wanted="release" if tool == "nvcc" else "")
    return f"{path} ({line})" if line else path


def _first_line_of(command: list[str], wanted: str = "") -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((s.strip() for s in done.stdout.splitlines() if s.strip() and wanted in s), None)


# --- backends ------------------------------------------------------------------------------------


def _backends() -> dict[str, dict[str, Any]]:
    return {
        "cpu": _cpu_backend(),
        "cuda": _cuda_backend(),
        "triton": _triton_backend(),
        "reference": _usable("plain PyTorch, on any device; slow"),
    }


def _usable(detail: str) -> dict[str, Any]:
    return {"usable": True, "detail": detail, "remedy": None}


def _missing(detail: str, remedy: str) -> dict[str, Any]:
    return {"usable": False, "detail": detail, "remedy": remedy}


def _cpu_backend() -> dict[str, Any]:
    if _native.cpu is not None:
        return _usable(f"native kernels for {_native.cpu.instruction_sets()[-1]}")
    if importlib.util.find_spec("fusedattn._cpu") is None:
        reason = "the native module fusedattn._cpu was not built"
    else:
        reason = f"fusedattn._cpu was built but does not load: {_native.cpu_error}"
    if not (shutil.which("g++") or shutil.which("c++")):
        reason += "; there is no C++ compiler"
    # Clang is refused: it would bring a second OpenMP runtime beside torch's libgomp.
    return _missing(reason, f"{_native.REMEDY} -v, which shows what setup.py found")


def _cuda_backend() -> dict[str, Any]:
    native = _native.cuda
    if native is None and importlib.util.find_spec("fusedattn._cuda") is None:
        reason = "the native module fusedattn._cuda was not built"
        if not shutil.which("nvcc"):
            reason += "; there is no nvcc on PATH"
        return _missing(reason, _native.CUDA_REMEDY)
    if native is None:
        reason = f"fusedattn._cuda was built but does not load: {_native.cuda_error}"
        return _missing(reason, _native.CUDA_REMEDY)
    targets = ", ".join(f"sm_{each}" for each in native.architectures())
    if torch.version.cuda is None or not torch.cuda.is_available():
        return _missing(
            f"kernels are built for {targets}, but torch finds no NVIDIA GPU",
            "run where there is one, with a CUDA build of torch (pytorch.org); if there is, check "
            "its driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
        )
    if (outdated := outdated_driver(native)) is not None:
        return _missing(*outdated)
    major, minor = torch.cuda.get_device_capability()
    if not native.runs_on(10 * major + minor):
        return _missing(
            f"kernels are built for {targets}, and {torch.cuda.get_device_name()} is "
            f"sm_{major}{minor}",
            _native.CUDA_REMEDY,
        )
    return _usable(f"native kernels for {targets}, on {torch.cuda.get_device_name()}")


def _triton_backend() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return _missing("triton is not installed", 'pip install "fusedattn[triton]"')
    if torch.cuda.is_available():
        return _usable(f"kernels for {torch.cuda.get_device_name()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _usable("interpreted on CPU tensors: for checking, thousands of times slower")
    if torch.version.cuda is None and torch.version.hip is None:
        return _missing(
            f"this torch ({torch.__version__}) is built without GPU support",
            "on a machine with a GPU, install a CUDA or ROCm build of torch (pytorch.org)",
        )
    return _missing(
        "torch finds no GPU",
        "run where there is one; if there is, check its driver (nvidia-smi) and "
        "CUDA_VISIBLE_DEVICES",
    )
