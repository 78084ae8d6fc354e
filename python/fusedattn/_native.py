"""The native modules, or why they are missing. Torch comes first: its OpenMP runtime is theirs."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

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


def cuda_workspace(size: int, index: int, stream: int) -> Tensor:
    """So many bytes on a GPU, for what is on `stream` and comes later on it."""
    device = torch.device("cuda", index)
    if torch.cuda.current_stream(device).cuda_stream == stream:
        return torch.empty(size, dtype=torch.uint8, device=device)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device)):
        return torch.empty(size, dtype=torch.uint8, device=device)


def emulated_workspace(size: int, index: int, stream: int) -> Tensor:
    """The same of the emulator, which has no streams."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


cpu, cpu_error = _load("_cpu")
cuda, cuda_error = _load("_cuda")
if cuda is not None:
    cuda.allocate_by(cuda_workspace)


@functools.cache
def cuda_emulated() -> Any:
    """The CUDA kernels on the host emulator, built for the tests only; None where it is not."""
    emulated = _load("_cuda_emulated")[0]
    if emulated is not None:
        emulated.allocate_by(emulated_workspace)
    return emulated
