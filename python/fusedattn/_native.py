"""The native modules, or why they are missing. Torch comes first: its OpenMP runtime is theirs."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch  # noqa: F401

REMEDY = (
    "install GCC and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev; Fedora: "
    "dnf install gcc-c++ python3-devel), then repeat the installation of fusedattn with "
    "--no-cache-dir --force-reinstall --no-deps"
)

CUDA_REMEDY = (
    "repeat the installation of fusedattn where nvcc and a GPU are found, or with "
    'FUSEDATTN_CUDA_ARCHS="80;90a" for GPUs by name'
)


def _load(name: str) -> tuple[Any, str | None]:
    """A native module, or None and why it is missing."""
    try:
        return importlib.import_module(f"fusedattn.{name}"), None
    except ImportError as error:
        return None, str(error)


cpu, cpu_error = _load("_cpu")
cuda, cuda_error = _load("_cuda")


@functools.cache
def cuda_emulated() -> Any:
    """The CUDA kernels on the host emulator, built for the tests only; None where it is not."""
    return _load("_cuda_emulated")[0]
