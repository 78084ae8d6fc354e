"""Library ops: how an op of ours becomes one of torch's, and when a call needs the dispatcher.

In plain eager mode a call goes straight to the kernel, or to the autograd Function around it. Where
something watches or traces (compile, export, jit.trace, dispatch modes, the profiler) it is one
call of `torch.ops.fusedattn`, which differentiates itself. Such a call may come back from a saved
program with other tensors, so that the op's kernel checks what the public function did.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .. import _native

_library = torch.library.Library("fusedattn", "DEF")
_flops: dict[Any, Callable[..., int]] = {}
_by_packet: dict[Any, LibraryOp] = {}

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
    tuple[int, ...] | None: "SymInt[]?",
}


class LibraryOp:
    """torch.ops.fusedattn.<name>, derived from `call`, the NamedTuple of its calls.

    The fields of `call` are tensors, then plain options, then flags, then a config. In the schema
    the backend's name and the fields of the config stand before the flags: DTensor's cache knows
    what follows the first int. What has a default has it in the schema too, so that a program saved
    before a field was there still loads. An absent output is None here, to torch an empty tensor.

    outputs: their names.
    allocate(call) -> the outputs, unwritten, which is the fake kernel too.
    run(call, kernels) -> the outputs.
    check(call) -> the call as the public function would have made it, or an error.
    wanted(call) -> which outputs there are; all by default.
    usual(call, native) -> the outputs, where the native CPU module serves the call at once, else
        None.
    mutates: how many of the first tensors are written to.
    """

    def __init__(
        self,
        name: str,
        call: Any,
        outputs: Sequence[str],
        *,
        allocate: Callable[[Any], tuple[Tensor | None, ...]],
        run: Callable[[Any, Any], tuple[Tensor | None, ...]],
        check: Callable[[Any], Any],
        wanted: Callable[[Any], Sequence[bool]] | None = None,
        flops: Callable[..., int] | None = None,
        mutates: int = 0,
        usual: Callable[[Any, Any], tuple[Tensor | None, ...] | None] | None = None,
    ) -> None:
        self.call, self._usual = call, usual
        self.outputs, self.wanted = tuple(outputs), wanted
        self._allocate, self._run, self._check = allocate, run, check
        *fields, (_, self._config) = get_type_hints(call).items()
        self._flags = sum(kind is bool for _, kind in fields)
        self._leading = len(fields) - self._flags
        self.tensors = sum(kind in (Tensor, Tensor | None) for _, kind in fields)
        arguments = [_argument(field, kind, call._field_defaults) for field, kind in fields]
        for i in range(mutates):
            arguments[i] = arguments[i].replace("Tensor", f"Tensor({'ab'[i]}!)", 1)
        options = get_type_hints(self._config).items()
        defaults = self._config._field_defaults
        configured = [_argument(field, kind, defaults) for field, kind in options]
        arguments[self._leading : self._leading] = ['str backend="auto"', *configured]
        last = max((i for i, each in enumerate(arguments) if "=" not in each), default=-1)
        arguments[:last] = [each.split("=")[0] for each in arguments[:last]]
        returns = ", ".join(f"Tensor {each}" for each in outputs)
        _library.define(f"{name}({', '.join(arguments)}) -> ({returns})")
        self.packet = getattr(torch.ops.fusedattn, name)
        _library.impl(name, self._kernel, "CompositeExplicitAutograd")
        _library.impl(name, self._recorded, "Autograd")
        torch.library.register_fake(f"fusedattn::{name}", self._fake, lib=_library)
        if flops is not None:
            _flops[self.packet] = flops
        self._ops: list[Any] = []
        _by_packet[self.packet] = self

    @staticmethod
    def of(overload: Any) -> LibraryOp | None:
        """The one that torch calls `overload`, if it is ours."""
        return _by_packet.get(overload.overloadpacket)

    def explain(self, requested: str, args: Sequence[Any]) -> str:
        """The backend that a call of torch's with these arguments would run, and why."""
        call, _ = self._rebuild(args)
        return self._owner(call).explain(requested, call)

    def belongs_to(self, op: Any) -> None:
        """`op` has the kernels, chooses among the backends and knows the gradient.

        Where there are several, the config of a call has the name of its own.
        """
        self._ops.append(op)
        self._kernels = self._ops[0].kernels

    def _owner(self, call: Any) -> Any:
        if len(self._ops) == 1:
            return self._ops[0]
        return next(op for op in self._ops if op.name == call.config.name)

    def autocast(self, tensors: int) -> None:
        """The first `tensors` arguments take autocast's dtype; float64 stays as it is."""
        for device in ("cpu", "cuda"):
            key = f"Autocast{device.upper()}"
            name = self.packet._qualified_op_name.split("::")[1]
            _library.impl(name, _cast(self.packet, tensors, device), key)

    def __call__(self, call: Any, backend: str) -> tuple[Tensor | None, ...]:
        """The outputs: at once in plain eager mode, else by the dispatcher."""
        if self._usual is not None and (native := cpu_at_once(backend)) is not None:
            found = self._usual(call, native)
            if found is not None:
                return found
        if plain(*call[: self.tensors]):
            return self._run(call, self._kernels(backend))
        return self.dispatch(call, backend)

    def dispatch(self, call: Any, backend: str) -> tuple[Tensor | None, ...]:
        """The outputs by the dispatcher."""
        register_flops()
        n = self._leading
        found = self.packet(*call[:n], backend, *call[-1], *call[n:-1])
        found = found if isinstance(found, tuple) else () if found is None else (found,)
        if self.wanted is None:
            return found
        return tuple(x if want else None for x, want in zip(found, self.wanted(call), strict=True))

    # --- what torch calls ---

    def _rebuild(self, args: Sequence[Any]) -> tuple[Any, str]:
        """The call and the backend, from the arguments in the schema's order."""
        args = with_defaults(self.packet.default, args)
        n, end = self._leading, len(args) - self._flags
        return self.call(*args[:n], *args[end:], self._config(*args[n + 1 : end])), args[n]

    def _present(self, call: Any, outputs: tuple[Tensor | None, ...]) -> Any:
        """Outputs as torch takes them."""
        like = next(x for x in call if isinstance(x, Tensor))
        found = tuple(like.new_empty(0) if x is None else x for x in outputs)
        return found if len(found) > 1 else found[0] if found else None

    def _kernel(self, *args: Any) -> Any:
        call, backend = self._rebuild(args)
        self._check_data(call)
        call = self._check(call)
        chosen = self._owner(call).choose(backend, call)
        return self._present(call, self._run(call, self._kernels(chosen)))

    def _fake(self, *args: Any) -> Any:
        call, _ = self._rebuild(args)
        return self._present(call, self._allocate(call))

    def _recorded(self, *args: Any) -> Any:
        """Above the kernel: where a gradient is recorded, the call is a node of autograd's."""
        _know_dtensors(args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            call, backend = self._rebuild(args)
            return self._present(call, self._owner(call).record_whole(call, backend))
        with torch._C._AutoDispatchBelowAutograd():
            return self.packet(*args)

    def _check_data(self, call: Any) -> None:
        """Tensors are there and have the elements that they stand for."""
        kinds = get_type_hints(self.call)
        for name, x in zip(self.call._fields, call[: self.tensors], strict=False):
            if not isinstance(x, Tensor):
                if kinds[name] is Tensor:  # torch takes None for an undefined one
                    raise TypeError(f"{self.packet}: got {name}={x!r}, expected a Tensor")
            elif x.numel() != 0 and x.data_ptr() == 0:
                raise ValueError(
                    f"{self.packet}: got {name} of shape {tuple(x.shape)} without data, expected "
                    "its elements: its storage was freed, or it is a subclass that has none"
                )


def with_defaults(op: Any, args: Sequence[Any]) -> Sequence[Any]:
    """All arguments of an op; torch leaves out the last ones where they are the default."""
    missing = op._schema.arguments[len(args) :]
    return (*args, *(each.default_value for each in missing)) if missing else args


def _argument(field: str, kind: Any, defaults: dict[str, Any]) -> str:
    """Its declaration in a schema; an optional tensor is None by default."""
    declared = f"{_SCHEMA_TYPES[kind]} {field}"
    if kind == Tensor | None:
        return f"{declared}=None"
    return f"{declared}={defaults[field]}" if field in defaults else declared


def _cast(packet: Any, tensors: int, device: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in args[:tensors])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return packet(*cast, *args[tensors:])

    return kernel


def _know_dtensors(tensors: Sequence[Any]) -> None:
    """Register our sharding rules when the first DTensor comes: they import much of torch."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and any(isinstance(x, module.DTensor) for x in tensors):
        from ..distributed.sharding import register

        register()


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


# Looked up once: what follows runs on every call.
_traced = torch.compiler.is_dynamo_compiling  # what else traces has a dispatch mode
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled
_recorded = torch._C._is_tracing  # by torch.jit.trace and what is built on it
_transforms = torch._C._are_functorch_transforms_active
_batched = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, "VmapMode")
_exports_onnx = torch.onnx.is_in_onnx_export
_is_compiling = torch.compiler.is_compiling
has_override = torch._C._has_torch_function_variadic
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_REFUSED_BY_NAME: Any = (type, torch.nn.parameter.UninitializedTensorMixin)  # type: ignore[attr-defined]
_USUAL_TYPES = (*_PLAIN_TYPES, type(None), bool, int, float, str, tuple)


def transformed() -> bool:
    """Where the formula itself is wanted, in torch's own ops.

    Under vmap, torch.func or forward mode, which batch and differentiate it (but see
    _transforms.py), and in an export to ONNX, which knows no others.
    """
    return (
        _transforms()
        or forward_ad._current_level >= 0
        # Asked last: torch imports a module to answer.
        or ((_traced() or _recorded() or _dispatch_modes() != 0) and _exports_onnx())
    )


def differentiated(recording: bool) -> bool:
    """Where a gradient is to be the formula, for what differentiates it in turn: forward mode, or
    autograd, if it is `recording`, on the batched tensors of `is_grads_batched`."""
    return forward_ad._current_level >= 0 or (recording and (_transforms() or _batched()))


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
    return tuple(
        x
        for x in given.values()
        if type(x) not in _USUAL_TYPES
        and not isinstance(x, _REFUSED_BY_NAME)
        and not (isinstance(x, Tensor) and x.is_nested)  # which knows functions by their names
    )


def plain(*tensors: Tensor | None) -> bool:
    """Nothing is watching or tracing: the dispatcher's 5 µs a call would find our kernel anyway.

    It does more for a tensor that stands for its negative, as `z.conj().imag` does.
    """
    if watched():
        return False
    try:
        for x in tensors:  # a generator takes twice as long
            if x is not None and (type(x) not in _PLAIN_TYPES or x.data_ptr() == 0 or x.is_neg()):
                _know_dtensors(tensors)
                return False
    except RuntimeError:  # without storage: left behind by a transform of torch.func
        return False
    return True
