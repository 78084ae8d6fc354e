"""Attention as library ops: schemas, fake kernels, FLOP rules, and how a call reaches a backend.

`call_forward` and `call_backward` are what autograd uses. In plain eager mode they run the kernel
at once; where something watches or traces (compile, export, dispatch modes, the profiler) they go
through `torch.ops.fusedattn`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ._registry import Op
from .attention_backends import BACKENDS
from .attention_config import AttentionConfig

op = Op("attention", BACKENDS)

# --- schema and fake -----------------------------------------------------------------------------

_library = torch.library.Library("fusedattn", "DEF")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = (
    "str backend, int causal, float scale, int window_left, int window_right, float softcap, "
    "float dropout_p"
)
_library.define(f"attention_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, bool bias_grad, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out laid out in memory as (B, Sq, Hq, Dv), so that merging the heads is a view; and lse."""
    batch, heads, seq, _ = q.shape
    dim = v.shape[3]
    out = q.new_empty_strided((batch, heads, seq, dim), (seq * heads * dim, dim, heads * dim, 1))
    if q.dtype in (torch.float16, torch.bfloat16):
        return out, q.new_empty((batch, heads, seq), dtype=torch.float32)
    return out, q.new_empty((batch, heads, seq))


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dbias = None if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _present(q: Tensor, grads: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients as a library op returns them: an unwanted one is empty."""
    return (*grads[:3], q.new_empty(0) if grads[3] is None else grads[3])


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, bias_grad: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _present(q, _empty_gradients(q, k, v, bias if bias_grad else None))


def _run_forward(q, k, v, mask, bias, kv_lengths, config, backend) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q, v)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    op.kernels(backend).forward(q, k, v, mask, bias, kv_lengths, out, lse, config)
    return out, lse


def _run_backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    grads = _empty_gradients(q, k, v, bias if bias_grad else None)
    if lse.numel() == 0 or k.numel() == 0:
        for x in grads:
            if x is not None:
                x.zero_()
        return grads
    op.kernels(backend).backward(
        dout, dlse, q, k, v, out, lse, *grads, mask, bias, kv_lengths, config
    )
    return grads


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, backend: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run_forward(q, k, v, mask, bias, kv_lengths, AttentionConfig(*options), backend)


def _backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, bias_grad: bool, backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    config = AttentionConfig(*options)
    grads = _run_backward(
        dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
    )
    return _present(q, grads)


class _Undifferentiable(torch.autograd.Function):
    """A raw op on tensors that require a gradient: it runs, but nothing flows back through it."""

    @staticmethod
    def forward(ctx: Any, raw: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "torch.ops.fusedattn.attention_fwd and attention_bwd have no gradient: "
            "call fusedattn.attention instead"
        )


def _below_autograd(raw: Any) -> Any:
    def kernel(*args: Any) -> Any:
        tensors = (x for x in args if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return _Undifferentiable.apply(raw, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    return kernel


def _autocast_forward(device: str) -> Any:
    """q, k and v take autocast's dtype; a bias keeps its own, and float64 stays as it is."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.fusedattn.attention_fwd(q, k, v, *rest)

    return kernel


for _device in ("cpu", "cuda"):
    _library.impl("attention_fwd", _autocast_forward(_device), f"Autocast{_device.upper()}")

for _name, _kernel, _fake in (
    ("attention_fwd", _forward, _forward_fake),
    ("attention_bwd", _backward, _backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(getattr(torch.ops.fusedattn, _name)), "Autograd")
    torch.library.register_fake(f"fusedattn::{_name}", _fake, lib=_library)


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two operations a multiply-add, as torch counts SDPA: causal is not halved."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any
) -> int:
    """Five products: the scores again and dq, dk over D; dp and dv over Dv."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def _register_flops() -> None:
    """Tell torch's FLOP counter, if it is there: importing it here would import triton.

    A counter that is already at work has copied the registry, so it is told as well.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return
    ops = torch.ops.fusedattn
    if ops.attention_fwd not in counter.flop_registry:
        counter.register_flop_formula(ops.attention_fwd)(_forward_flops)
        counter.register_flop_formula(ops.attention_bwd)(_backward_flops)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            for op_of_ours in (ops.attention_fwd, ops.attention_bwd):
                mode.counter.flop_registry.setdefault(op_of_ours, counter.flop_registry[op_of_ours])


# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Nothing is watching or tracing: the dispatcher's 5 µs a call would find our kernel anyway."""
    return (
        not _is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not q.is_meta
        and _dispatch_modes() == 0
        and not _profiled()
    )


def call_forward(q, k, v, mask, bias, kv_lengths, config, backend):
    if _plain(q, k, v):
        return _run_forward(q, k, v, mask, bias, kv_lengths, config, backend)
    _register_flops()
    return torch.ops.fusedattn.attention_fwd(
        q, k, v, mask, bias, kv_lengths, None, None, None, backend, *config
    )


def call_backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
):
    if _plain(q, k, v):
        return _run_backward(
            dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
        )
    return torch.ops.fusedattn.attention_bwd(
        dout, dlse, out, lse, q, k, v, mask, bias, kv_lengths, None, None, None, bias_grad,
        backend, *config,
    )  # fmt: skip
