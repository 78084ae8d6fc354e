"""What every op's backends have in common: which tensors they take, and the native kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._registry import Backend, Refusal

HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        return Refusal(f"tensors are on {x.device.type}", f"move {what} to a cuda device", "gpu")
    if _native.cuda is None:
        return Refusal(f"native module missing ({_native.cuda_error})", _native.CUDA_REMEDY)
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    mismatch = _mismatch_on(x.device.index)
    return None if mismatch is None else Refusal(*mismatch)


def _constant_in_graphs(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, which itself imports dynamo, and so triton."""
    function._dynamo_marked_constant = True
    return function


@_constant_in_graphs  # dynamo cannot trace native code
def _mismatch_on(index: int) -> tuple[str, str] | None:
    return _mismatch(index)


@functools.cache
def _mismatch(index: int) -> tuple[str, str] | None:
    """Why a GPU, or its driver, cannot run the CUDA module, and what to do about it."""
    if (outdated := outdated_driver(_native.cuda)) is not None:
        return outdated
    capability = capability_of(index)
    if _native.cuda.runs_on(capability):
        return None
    targets = ", ".join(f"sm_{each}" for each in _native.cuda.architectures())
    return f"built for {targets}, the GPU is sm_{capability}", _native.CUDA_REMEDY


def outdated_driver(cuda: Any) -> tuple[str, str] | None:
    """That the driver is older than what the module was built with, and the remedy."""
    runtime, driver = cuda.versions()
    if driver // 1000 >= runtime // 1000:  # within a major release older drivers serve
        return None
    return (
        f"built by CUDA {_release(runtime)}, the driver knows {_release(driver)}",
        f"update the driver, or repeat the installation with an nvcc of {_release(driver)}",
    )


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _capability(index: int) -> int:
    try:
        major, minor = torch.cuda.get_device_capability(index)
    except (AssertionError, RuntimeError):  # torch has none to ask: the tensor is fake
        return 0
    return 10 * major + minor


@_constant_in_graphs
def architecture_of(index: int) -> str:
    """The name of an AMD GPU, as gfx942."""
    return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]


@_constant_in_graphs
def capability_of(index: int) -> int:
    """10 · major + minor of an NVIDIA GPU, 90 of sm_90; 0 where there is none."""
    return _capability(index)


def emulated_refuses(x: Tensor, requested: bool) -> Refusal | None:
    """Why the CUDA C++ kernels do not take tensors like `x` under the host emulator."""
    if not requested:
        return Refusal("an emulator, for tests", 'ask for it with backend="cuda_emulated"', "tests")
    if not x.is_cpu:
        return Refusal(f"tensors are on {x.device.type}", "move the tensors to a cpu device")
    if _native.cuda_emulated() is None:
        return Refusal("the emulator is not built", "python setup.py build_emulator")
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    return None


def triton_refuses(x: Tensor, requested: bool, what: str = "the tensors") -> Refusal | None:
    """Why Triton does not take tensors like `x`; on a CPU it is interpreted, on request."""
    device = x.device.type
    if not HAS_TRITON:
        remedy = 'pip install "fusedattn[triton]"'
        return Refusal("triton is not installed", remedy, "" if device == "cuda" else "gpu")
    if device not in ("cpu", "cuda", "meta"):  # ROCm's GPUs are cuda to torch
        return Refusal(f"tensors are on {device}", f"move {what} to a cuda device", "gpu")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Refusal("tensors are on cpu", f"move {what} to a cuda device", "gpu")
    if device == "cpu" and not requested:
        return Refusal("on a CPU Triton is interpreted", 'ask for it with backend="triton"')
    if x.dtype == torch.float64:
        return Refusal("dtype is torch.float64", "use float32, bfloat16 or float16")
    return None


def standard_backends(
    op: str,
    given: Callable[[Any], Tensor],
    triton: Callable[[], Any],
    reference: Callable[[], Any],
    what: str = "the tensors",
    gpu_refuses: Callable[[Any], Refusal | None] = lambda call: None,
) -> tuple[Backend, ...]:
    """The backends of an op in order of preference, where one tensor of a call decides.

    given(call): that tensor, to the user `what`. triton, reference: they give the kernels.
    gpu_refuses: why those for a GPU do not take a call that they else would.
    """

    def native(module: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: native_kernels(module(), op)

    def with_gpu(refuse: Callable[[Tensor, bool], Refusal | None]) -> Any:
        return lambda call, named: refuse(given(call), named) or gpu_refuses(call)

    return (
        Backend(
            "cpu",
            lambda call, named: cpu_refuses(given(call), what),
            native(lambda: _native.cpu),
        ),
        Backend(
            "cuda", with_gpu(lambda x, named: cuda_refuses(x, what)), native(lambda: _native.cuda)
        ),
        Backend("triton", with_gpu(lambda x, named: triton_refuses(x, named, what)), triton),
        Backend("cuda_emulated", with_gpu(emulated_refuses), native(_native.cuda_emulated)),
        Backend("reference", lambda call, named: None, reference),
    )


def native_kernels(native: Any, op: str) -> SimpleNamespace:
    """A native module's `forward`, `backward` and `jvp` of an op, each kernel(call, *outputs).

    They take tensors of fewer dimensions than the kernels do: `any_rank`.
    """
    found = {
        direction: getattr(native, f"{op}_{direction}")
        for direction in ("forward", "backward", "jvp")
        if hasattr(native, f"{op}_{direction}")
    }
    if native is _native.cuda:
        found = {direction: _on_stream(function) for direction, function in found.items()}
    return SimpleNamespace(**found, any_rank=True)


def _on_stream(function: Any) -> Any:
    """`function` on the current CUDA stream, which native code takes as an integer."""

    def kernel(call: Any, *outputs: Tensor | None) -> None:
        device = next(x.device for x in outputs if x is not None)
        function(call, *outputs, torch.cuda.current_stream(device).cuda_stream)

    return kernel
