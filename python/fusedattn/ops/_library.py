"""Library ops: how an op of ours becomes one of torch's, and when a call needs the dispatcher.

`define` gives an op its schema, kernel, fake, FLOP rule and autocast rule. Autograd stands outside:
a Function asks `plain`. In plain eager mode it goes straight to the kernel; where something watches
or traces (compile, export, jit.trace, dispatch modes, the profiler) it goes through
`torch.ops.fusedattn`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .. import _native

_library = torch.library.Library("fusedattn", "DEF")
_flops: dict[Any, Callable[..., int]] = {}


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    instead: str,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define torch.ops.fusedattn.<name> from `schema`, "name(Tensor x, ...) -> ...", and return it.

    Called directly on tensors that require a gradient the op runs, and raises in its backward:
    the differentiable function is `instead`.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    packet = getattr(torch.ops.fusedattn, name)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, _below_autograd(packet, instead), "Autograd")
    torch.library.register_fake(f"fusedattn::{name}", fake, lib=_library)
    if flops is not None:
        _flops[packet] = flops
    return packet


def define_autocast(packet: Any, tensors: int) -> None:
    """The first `tensors` arguments take autocast's dtype; float64 stays as it is."""
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        _library.impl(packet._qualified_op_name.split("::")[1], _cast(packet, tensors, device), key)


def _cast(packet: Any, tensors: int, device: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in args[:tensors])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return packet(*cast, *args[tensors:])

    return kernel


class _Undifferentiable(torch.autograd.Function):
    """A raw op on tensors that require a gradient: it runs, but nothing flows back through it."""

    @staticmethod
    def forward(ctx: Any, raw: Any, instead: str, *args: Any) -> Any:
        ctx.message = f"torch.ops.{raw} has no gradient: call {instead} instead"
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)


def _below_autograd(raw: Any, instead: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        tensors = (x for x in args if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return _Undifferentiable.apply(raw, instead, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    return kernel


def register_flops() -> None:
    """Tell torch's FLOP counter, if it is there: importing it here would import triton.

    A counter that is already at work has copied the registry, so it is told as well.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return
    for packet, formula in _flops.items():
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            for packet in _flops:
                mode.counter.flop_registry.setdefault(packet, counter.flop_registry[packet])


def direct(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` for calls outside torch.func's transforms.

    torch's own `apply` prepares for these on every call, which takes 2 µs; under one it raises,
    and this one is wrong. That of the backward, another 1 µs, looks whether it is called `vjp`.
    """
    apply = torch._C._FunctionBase.__dict__["apply"]
    found: Any = type(function.__name__, (function,), {"apply": apply, "__doc__": function.__doc__})
    found._backward_cls.apply = function.backward
    return found


# Looked up once: what follows runs on every call.
_traced = torch.compiler.is_dynamo_compiling  # what else traces has a dispatch mode
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled
_recorded = torch._C._is_tracing  # by torch.jit.trace and what is built on it
_transforms = torch._C._are_functorch_transforms_active
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Under vmap, torch.func or forward mode, which batch and differentiate the formula itself."""
    return _transforms() or forward_ad._current_level >= 0


def _watched() -> bool:
    return _traced() or _dispatch_modes() != 0 or _profiled() or _recorded()


def cpu_at_once(backend: str) -> Any:
    """The native CPU module if it may take a call that Python has not looked at, else None.

    It may in plain eager mode; the module then says whether it is a usual call.
    """
    # `_watched` and `transformed`, in one call in place of three.
    if (
        (backend != "auto" and backend != "cpu")
        or _traced()
        or _dispatch_modes() != 0
        or _profiled()
        or _recorded()
        or _transforms()
        or forward_ad._current_level >= 0
    ):
        return None
    return _native.cpu


def plain(*tensors: Tensor | None) -> bool:
    """Nothing is watching or tracing: the dispatcher's 5 µs a call would find our kernel anyway.

    It does more for a tensor that stands for its negative, as `z.conj().imag` does.
    """
    if _watched():
        return False
    try:
        for x in tensors:  # a generator takes twice as long
            if x is not None and (type(x) not in _PLAIN_TYPES or x.data_ptr() == 0 or x.is_neg()):
                return False
    except RuntimeError:  # without storage: left behind by a transform of torch.func
        return False
    return True
