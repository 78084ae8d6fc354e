"""What every op's backends have in common: which tensors they take, and the stream of a launch."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._registry import Refusal

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def cpu_refuses(x: Tensor, what: str = "the tensors") -> Refusal | None:
    """Why the native CPU kernels do not take tensors like `x`; meta tensors pass."""
    if not x.is_cpu and not x.is_meta:
        return Refusal(f"tensors are on {x.device.type}", f"move {what} to a cpu device")
    if _native.cpu is None:
        return Refusal(f"native module missing ({_native.cpu_error})", _native.REMEDY)
    return None


def cuda_refuses(x: Tensor, what: str = "the tensors") -> Refusal | None:
    """Why the CUDA C++ kernels do not take tensors like `x`."""
    if not x.is_cuda:
        return Refusal(f"tensors are on {x.device.type}", f"move {what} to a cuda device")
    if _native.cuda is None:
        return Refusal(f"native module missing ({_native.cuda_error})", _native.CUDA_REMEDY)
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    mismatch = _mismatch_on(x.device.index)
    return None if mismatch is None else Refusal(mismatch, _native.CUDA_REMEDY)


def _constant_in_graphs(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, which itself imports dynamo, and so triton."""
    function._dynamo_marked_constant = True
    return function


@_constant_in_graphs  # dynamo cannot trace native code
def _mismatch_on(index: int) -> str | None:
    return _mismatch(index)


@functools.cache
def _mismatch(index: int) -> str | None:
    """What the CUDA module was built for, where a GPU cannot run that."""
    major, minor = torch.cuda.get_device_capability(index)
    if _native.cuda.runs_on(10 * major + minor):
        return None
    targets = ", ".join(f"sm_{each}" for each in _native.cuda.architectures())
    return f"built for {targets}, the GPU is sm_{major}{minor}"


def emulated_refuses(x: Tensor, requested: bool) -> Refusal | None:
    """Why the CUDA C++ kernels do not take tensors like `x` under the host emulator."""
    if not requested:
        return Refusal("an emulator, for tests", 'ask for it with backend="cuda_emulated"')
    if not x.is_cpu:
        return Refusal(f"tensors are on {x.device.type}", "move the tensors to a cpu device")
    if _native.cuda_emulated() is None:
        return Refusal("the emulator is not built", "python setup.py build_emulator")
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    return None


def triton_refuses(x: Tensor, requested: bool, what: str = "the tensors") -> Refusal | None:
    """Why Triton does not take tensors like `x`; on a CPU it is interpreted, on request."""
    if not _HAS_TRITON:
        return Refusal("triton is not installed", 'pip install "fusedattn[triton]"')
    device = x.device.type
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Refusal("tensors are on cpu", f"move {what} to a cuda device")
    if device == "cpu" and not requested:
        return Refusal("on a CPU Triton is interpreted", 'ask for it with backend="triton"')
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    return None


def stream_of(x: Tensor) -> int:
    """The current CUDA stream on the device of `x`, as native code takes it; 0 on a CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
