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
from torch import Tensor

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, cuda_refuses, emulated_refuses, stream_of, triton_refuses
from ._library import plain
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


# --- cuda: csrc/cuda/attention.cu ----------------------------------------------------------------

# Row numbers and their sums fit in 32 bits.
_LONGEST = 2**30


def _in_packs(x: Tensor) -> bool:
    """Whether every row can be read 16 bytes at a time. Where nothing is known of its address,
    the kernels' caller looks again."""
    *outer, last = x.stride()
    return (
        (last == 1 or x.shape[3] == 1)
        and all(step % 8 == 0 or size == 1 for step, size in zip(outer, x.shape, strict=False))
        and (not plain(x) or x.data_ptr() % 16 == 0)
    )


def _cuda_takes(call: AttentionCall) -> Refusal | None:
    """Why the CUDA C++ kernels do not take a call on tensors that are where they can reach them."""
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return Refusal(f"dtype is {call.q.dtype}", "use bfloat16 or float16")
    if call.mask is not None or call.bias is not None:
        name = "mask" if call.mask is not None else "bias"
        return Refusal(
            f"{name} is not supported", f"leave {name} out, or use causal and kv_lengths"
        )
    for name, x in (("D", call.q), ("Dv", call.v)):
        width = x.shape[3]
        if width % 8 != 0 or width > 256:
            return Refusal(f"{name} is {width}", "use a multiple of 8, at most 256")
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if not _in_packs(x):
            return Refusal(
                f"{name} of strides {tuple(x.stride())} does not lie in rows of aligned 16 bytes",
                f"pass {name}.contiguous()",
            )
        if x.shape[2] > _LONGEST:
            return Refusal(f"{name} has {x.shape[2]} rows", f"use at most {_LONGEST}")
    return _refuse_pending(call)


def _cuda_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return cuda_refuses(call.q, "q, k and v") or _cuda_takes(call)


def _emulated_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return emulated_refuses(call.q, requested) or _cuda_takes(call)


def _cuda_kernels(native: Any) -> Any:
    def packed(x: Tensor | None) -> Tensor | None:
        return x if x is None or _in_packs(x) else x.clone(memory_format=torch.contiguous_format)

    def forward(q, k, v, mask, bias, kv_lengths, out, lse, config):
        native.attention_forward(
            packed(q), packed(k), packed(v), mask, bias, kv_lengths, out, lse, config, stream_of(q)
        )

    def backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, mask, bias, kv_lengths, config):
        native.attention_backward(
            packed(dout), dlse, packed(q), packed(k), packed(v), packed(out), lse, dq, dk, dv,
            dbias, mask, bias, kv_lengths, config, stream_of(q),
        )  # fmt: skip

    return SimpleNamespace(forward=forward, backward=backward)


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
    Backend("cuda", _cuda_refuses, lambda: _cuda_kernels(_native.cuda)),
    Backend("triton", _triton_refuses, _triton_kernels),
    Backend("cuda_emulated", _emulated_refuses, lambda: _cuda_kernels(_native.cuda_emulated())),
    Backend("reference", _reference_refuses, _reference_kernels),
)
