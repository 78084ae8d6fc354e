"""Library ops: how an op of ours becomes one of torch's, and when a call needs the dispatcher.

`define` gives an op its schema, kernel, fake, FLOP rule and autocast rule, `differentiate` its
gradient. In plain eager mode a call goes straight to the kernel, or to the autograd Function around
it. Where something watches or traces (compile, export, jit.trace, dispatch modes, the profiler) it
is one call of `torch.ops.fusedattn`, which differentiates itself. Such a call may come back from a
saved program with other tensors, so that the op's kernel checks what the public function did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .. import _native

_library = torch.library.Library("fusedattn", "DEF")
_flops: dict[Any, Callable[..., int]] = {}
_differentiable: dict[Any, Callable[..., Any]] = {}


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define torch.ops.fusedattn.<name> from `schema`, "name(Tensor x, ...) -> ...", and return it.

    `kernel` checks its arguments: the op is what remains of a call in a traced program, whose
    tensors may be others than those it was traced with.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    packet = getattr(torch.ops.fusedattn, name)
    _library.impl(name, _on_data(packet, kernel), "CompositeExplicitAutograd")
    _library.impl(name, _recorded_by(packet), "Autograd")
    torch.library.register_fake(f"fusedattn::{name}", fake, lib=_library)
    if flops is not None:
        _flops[packet] = flops
    return packet


def differentiate(packet: Any, function: Callable[..., Any]) -> None:
    """Where a gradient is recorded, `packet` is `function` of the same arguments."""
    _differentiable[packet] = function


def _on_data(packet: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, for tensors that are there and have the elements that they stand for."""
    arguments = [(each.name, str(each.type)) for each in packet.default._schema.arguments]

    def checked(*args: Any) -> Any:
        for (name, kind), x in zip(arguments, args, strict=False):
            if not isinstance(x, Tensor):
                if kind == "Tensor":  # torch takes None for an undefined one
                    raise TypeError(f"{packet}: got {name}={x!r}, expected a Tensor")
            elif x.numel() != 0 and x.data_ptr() == 0:
                raise ValueError(
                    f"{packet}: got {name} of shape {tuple(x.shape)} without data, expected its "
                    "elements: its storage was freed, or it is a subclass that has none"
                )
        return kernel(*args)

    return checked


def _recorded_by(packet: Any) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return _differentiable[packet](*args)
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*args)

    return kernel


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


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, and what `kept` compares where hooks may give back other tensors."""
    ctx.save_for_backward(*tensors)
    ctx.kept = _layouts(tensors) if _saving_hooks(False) is not None else None


def kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors that `keep` saved.

    Raises:
        RuntimeError: a saved-tensor hook gave back another dtype or shape.
    """
    tensors = ctx.saved_tensors
    if ctx.kept is not None and ctx.kept != (found := _layouts(tensors)):
        got, expected = next(
            pair for pair in zip(found, ctx.kept, strict=True) if pair[0] != pair[1]
        )
        raise RuntimeError(
            f"{type(ctx).__name__}: got a saved tensor (dtype, shape) {got} from a saved-tensor "
            f"hook, expected it as it was saved, {expected}"
        )
    return tensors


def _layouts(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if x is None else (x.dtype, tuple(x.shape)) for x in tensors]


def second_order(
    formula: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of Σ cotangent · output over the outputs of `formula(*inputs)`.

    One for each input that requires a gradient, else None. They are taken with respect to views of
    the inputs: these may share a history, which is for autograd to go on with and not for this.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        pairs = [
            (output, cotangent.to(output.dtype))
            for output, cotangent in zip(formula(*views), cotangents, strict=True)
            if output is not None and cotangent is not None and output.requires_grad
        ]
    chosen = [x for x in views if x is not None and x.requires_grad]
    found: Any = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            chosen,
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
        if pairs and chosen
        else [None] * len(chosen)
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


# Looked up once: what follows runs on every call.
_traced = torch.compiler.is_dynamo_compiling  # what else traces has a dispatch mode
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled
_recorded = torch._C._is_tracing  # by torch.jit.trace and what is built on it
_transforms = torch._C._are_functorch_transforms_active
_exports_onnx = torch.onnx.is_in_onnx_export
_is_compiling = torch.compiler.is_compiling
has_override = torch._C._has_torch_function_variadic
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_USUAL_TYPES = (*_PLAIN_TYPES, type(None), bool, int, float, str, tuple)


def transformed() -> bool:
    """Where the formula itself is wanted, in torch's own ops.

    Under vmap, torch.func or forward mode, which batch and differentiate it, and in an export to
    ONNX, which knows no others.
    """
    return (
        _transforms()
        or forward_ad._current_level >= 0
        # Asked last: torch imports a module to answer.
        or ((_traced() or _recorded() or _dispatch_modes() != 0) and _exports_onnx())
    )


def watched() -> bool:
    """Something watches or traces: the call is to be one op of torch's, gradient and all."""
    return _traced() or _dispatch_modes() != 0 or _profiled() or _recorded()


def cpu_at_once(backend: str) -> Any:
    """The native CPU module if it may take a call that Python has not looked at, else None.

    It may in plain eager mode; the module then says whether it is a usual call.
    """
    # `watched` and `transformed`, in one call in place of three.
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


def is_overridden(given: dict[str, Any]) -> bool:
    """Whether an argument has a `__torch_function__`: a subclass of Tensor, or torch.fx's Proxy.

    Asked where torch's `has_override` says yes, as it does in a mode too. Dynamo traces what is
    inside; modes see that as well.
    """
    return not _is_compiling() and torch.overrides.has_torch_function(_unusual(given))


def hand_over(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What `__torch_function__` makes of `function(**given)`, as in torch's own functions."""
    return torch.overrides.handle_torch_function(function, _unusual(given), **given)


def _unusual(given: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(x for x in given.values() if type(x) not in _USUAL_TYPES)


def plain(*tensors: Tensor | None) -> bool:
    """Nothing is watching or tracing: the dispatcher's 5 µs a call would find our kernel anyway.

    It does more for a tensor that stands for its negative, as `z.conj().imag` does.
    """
    if watched():
        return False
    try:
        for x in tensors:  # a generator takes twice as long
            if x is not None and (type(x) not in _PLAIN_TYPES or x.data_ptr() == 0 or x.is_neg()):
                return False
    except RuntimeError:  # without storage: left behind by a transform of torch.func
        return False
    return True
