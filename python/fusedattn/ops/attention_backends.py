"""Attention's backends in order of preference: what each takes, and its kernels.

Kernels are objects with

    forward(q, k, v, mask, bias, kv_lengths, out, lse, config)
    backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, mask, bias, kv_lengths, config)

that write every element of their outputs; mask and bias have four dimensions, nothing is empty,
dout or dlse may be None (zero), dbias is None when it is not wanted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, triton_refuses
from ._registry import Backend, Refusal
from .attention_config import AttentionCall, AttentionConfig


def _refuse_pending(call: AttentionCall) -> Refusal | None:
    name = call.config.pending
    if call.alibi_slopes is not None:
        name = "alibi_slopes"
    elif call.sinks is not None:
        name = "sinks"
    return Refusal(f"{name} is not supported yet", f"leave {name} out") if name else None


# --- cpu: csrc/cpu -------------------------------------------------------------------------------


def _cpu_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return cpu_refuses(call.q, "q, k and v") or _refuse_pending(call)


def _cpu_kernels() -> Any:
    native = _native.cpu
    return SimpleNamespace(forward=native.attention_forward, backward=native.attention_backward)


# --- triton: kernels/attention_fwd.py, kernels/attention_bwd.py ----------------------------------


def _triton_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    refusal = triton_refuses(call.q, requested, "q, k and v")
    if refusal is not None:
        return refusal
    widest = max(call.q.shape[3], call.v.shape[3])
    if widest > 512:
        return Refusal(f"head dim {widest} is above 512", "use at most 512")
    return _refuse_pending(call)


def _triton_kernels() -> Any:
    from ..kernels.attention_bwd import attention_backward
    from ..kernels.attention_fwd import attention_forward

    def forward(q, k, v, mask, bias, kv_lengths, out, lse, config):
        attention_forward(
            q, k, v, out, lse, mask=mask, bias=bias, kv_lengths=kv_lengths, config=config
        )

    def backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, mask, bias, kv_lengths, config):
        total = None if dbias is None else torch.zeros_like(dbias, dtype=torch.float32)
        attention_backward(
            dout, dlse, q, k, v, out, lse, dq, dk, dv, total,
            mask=mask, bias=bias, kv_lengths=kv_lengths, config=config,
        )  # fmt: skip
        if dbias is not None:
            dbias.copy_(total)

    return SimpleNamespace(forward=forward, backward=backward)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return _refuse_pending(call)


def _reference_kernels() -> Any:
    def wide(x: Any) -> Any:
        """Half precision computes in float32, as the kernels do. BLAS picks its method by strides,
        so a contiguous copy keeps them out of the result."""
        if x is None:
            return None
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).contiguous()

    def options(mask, bias, kv_lengths, config: AttentionConfig) -> dict[str, Any]:
        return {
            "mask": mask,
            "bias": wide(bias),
            "kv_lengths": kv_lengths,
            "causal": config.causal_name,
            "scale": config.scale,
        }

    def forward(q, k, v, mask, bias, kv_lengths, out, lse, config):
        with torch.autocast(q.device.type, enabled=False):
            found = reference.attention(
                wide(q), wide(k), wide(v), **options(mask, bias, kv_lengths, config)
            )
        out.copy_(found[0])
        lse.copy_(found[1])

    def backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, mask, bias, kv_lengths, config):
        inputs = (wide(dout), dlse, wide(q), wide(k), wide(v))
        with torch.autocast(q.device.type, enabled=False):
            *found, ds = reference.attention_backward(
                *inputs, **options(mask, bias, kv_lengths, config)
            )
        for grad, value in zip((dq, dk, dv), found, strict=True):
            grad.copy_(value)
        if dbias is not None:
            dbias.copy_(ds.sum_to_size(dbias.shape))

    return SimpleNamespace(forward=forward, backward=backward)


BACKENDS = (
    Backend("cpu", _cpu_refuses, _cpu_kernels),
    Backend("triton", _triton_refuses, _triton_kernels),
    Backend("reference", _reference_refuses, _reference_kernels),
)
