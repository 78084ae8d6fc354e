"""Attention as library ops: schemas, fake kernels, FLOP rules, and how a call reaches a backend.

`call_forward` and `call_backward` are what autograd uses. In plain eager mode they run the kernel
at once; where something watches or traces (compile, export, jit.trace, dispatch modes, the
profiler) they go through `torch.ops.fusedattn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_like
from ._library import define, define_autocast, plain, register_flops
from ._registry import Op, UnsupportedError
from .attention_backends import BACKENDS
from .attention_config import AttentionCall, AttentionConfig, validate, validate_extras

op = Op("attention", BACKENDS)

# --- schema and fake -----------------------------------------------------------------------------

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = (
    "str backend, int causal, float scale, int window_left, int window_right, float softcap, "
    "float dropout_p, bool deterministic"
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


def _check(
    inputs: Sequence[Any], config: AttentionConfig, backend: str
) -> tuple[AttentionCall, str]:
    """The call, if its tensors and options fit together, and the backend that takes it."""
    q, k, v, mask, bias, kv_lengths, alibi_slopes, sinks, seed = inputs
    validate(q, k, v)
    mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
    if config.causal not in (0, 1, 2):
        raise ValueError(f"attention: got causal={config.causal}, expected 0, 1 or 2")
    if seed is not None:
        raise UnsupportedError("attention: seed is not supported yet; leave seed out")
    call = AttentionCall(q, k, v, mask, bias, kv_lengths, alibi_slopes, sinks, config)
    return call, op.choose(backend, call)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    config = AttentionConfig(*args[10:])
    call, chosen = _check(args[:9], config, args[9])
    return _run_forward(*call[:6], config, chosen)


def _backward(dout, dlse, out, lse, *args: Any) -> tuple[Tensor, ...]:
    bias_grad, config = args[9], AttentionConfig(*args[11:])
    call, chosen = _check(args[:9], config, args[10])
    q, k, v, mask, bias, kv_lengths = call[:6]
    if bias_grad and bias is None:
        raise ValueError("attention_bwd: got bias_grad=True without a bias, expected one")
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    shape, rows = (*q.shape[:3], v.shape[3]), q.shape[:3]
    for name, x, of, dtype in (
        ("dout", dout, shape, q.dtype), ("out", out, shape, q.dtype),
        ("dlse", dlse, rows, wide), ("lse", lse, rows, wide),
    ):  # fmt: skip
        if x is not None:
            check_like("attention_bwd", name, x, of, dtype, q.device)
    grads = _run_backward(
        dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, chosen
    )
    return _present(q, grads)


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two operations a multiply-add, as torch counts SDPA: causal is not halved."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any
) -> int:
    """Five products: the scores again and dq, dk over D; dp and dv over Dv."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


attention_fwd = define(
    f"attention_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _forward, _forward_fake, flops=_forward_flops,
)  # fmt: skip
attention_bwd = define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, bool bias_grad, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _backward, _backward_fake, flops=_backward_flops,
)  # fmt: skip
define_autocast(attention_fwd, tensors=3)  # q, k and v; a bias keeps its dtype


def call_forward(q, k, v, mask, bias, kv_lengths, config, backend):
    if plain(q, k, v, mask, bias, kv_lengths):
        return _run_forward(q, k, v, mask, bias, kv_lengths, config, backend)
    register_flops()
    return attention_fwd(q, k, v, mask, bias, kv_lengths, None, None, None, backend, *config)


def call_backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
):
    if plain(dout, dlse, q, k, v, mask, bias, kv_lengths):
        return _run_backward(
            dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
        )
    return attention_bwd(
        dout, dlse, out, lse, q, k, v, mask, bias, kv_lengths, None, None, None, bias_grad,
        backend, *config,
    )  # fmt: skip
