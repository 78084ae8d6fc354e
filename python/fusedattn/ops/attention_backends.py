"""Attention's backends, in order of preference: what each refuses, and its kernels.

Kernels are objects with

    forward(call, out, lse)                 call an `AttentionCall`
    backward(call, dq, dk, dv, dbias, dalibi_slopes, ddistance_bias)    an `AttentionBackwardCall`
    jvp(call, out, lse, t_out, t_lse)       an `AttentionJvpCall`

that write every element of their outputs. mask and bias have four dimensions, nothing is empty but
single sequences of a packed call, dout or dlse may be None (zero), and so are outputs that are not
wanted, but not all of them. The gradient of the sinks needs no scores: `_sinks_gradient`.
"""

from __future__ import annotations

import functools
import operator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference import cache, rules, varlen
from ..reference import functional as reference
from ._backends import (
    architecture_of,
    capability_of,
    cpu_refuses,
    cuda_refuses,
    emulated_refuses,
    native_kernels,
    triton_refuses,
)
from ._checks import HALVES
from ._library import plain
from ._op import Outputs
from ._registry import Backend, Refusal
from .attention_config import AttentionBackwardCall, AttentionCall, AttentionJvpCall

# --- backends ------------------------------------------------------------------------------------


def _refuse_cache(call: Any) -> Refusal | None:
    return Refusal("a cache is not supported", "use attention") if call.config.cached else None


# --- cpu: csrc/cpu -------------------------------------------------------------------------------


def _cpu_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return cpu_refuses(call.q, "q, k and v")


# --- cuda: csrc/cuda/attention.cu ----------------------------------------------------------------

# Row numbers and their sums fit in 32 bits, and so do rows padded to tiles of each sequence.
_LONGEST = 2**30
_MOST_SEQUENCES = 2**22


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
    if isinstance(call, AttentionJvpCall):
        return Refusal("forward mode is not supported", "leave it to triton")
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return Refusal(f"dtype is {call.q.dtype}", "use bfloat16 or float16")
    if call.mask is not None:
        return Refusal(
            "mask is not supported", "leave mask out, or use causal, window and kv_lengths"
        )
    for name in ("distance_bias", "prefix_lengths", "documents_q", "mask_blocks"):
        if getattr(call, name) is not None:
            return Refusal(f"{name} is not supported", "use another mask or bias")
    if call.cu_seqlens_q is not None and call.cu_seqlens_q.shape[0] > _MOST_SEQUENCES + 1:
        number = call.cu_seqlens_q.shape[0] - 1
        return Refusal(f"there are {number} sequences", f"pack at most {_MOST_SEQUENCES}")
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
    return _refuse_cache(call)


def _outrun(call: Any) -> Refusal | None:
    """Where the product of a warpgroup is in reach of Triton's forward, and mma.sync is not it."""
    unit = {9: "wgmma", 10: "tcgen05"}.get(capability_of(call.q.device.index) // 10)
    if unit is None or not isinstance(call, AttentionCall) or _triton_refuses(call, False):
        return None
    return Refusal(f"triton's forward is faster here, by {unit}", 'ask for it with backend="cuda"')


def _cuda_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    refusal = cuda_refuses(call.q, "q, k and v") or _cuda_takes(call)
    return refusal or (None if requested else _outrun(call))


def _emulated_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return emulated_refuses(call.q, requested) or _cuda_takes(call)


def _cuda_kernels(native: Any) -> Any:
    """Rows of 16 bytes and int32 lengths, copied where they are not so."""
    run = native_kernels(native, "attention")

    def readable(call: Any) -> Any:
        changed = {}
        for name in ("q", "k", "v", "out", "dout"):
            x = getattr(call, name, None)
            if x is not None and not _in_packs(x):
                changed[name] = x.clone(memory_format=torch.contiguous_format)
        lengths = call.kv_lengths
        wide = lengths is not None and lengths.dtype == torch.int64
        if wide and lengths.untyped_storage().nbytes() != 0:  # freed: for the module to refuse
            changed["kv_lengths"] = lengths.clamp(0, call.k.shape[2]).to(torch.int32)
        return call._replace(**changed) if changed else call

    def backward(call: AttentionBackwardCall, *grads: Tensor | None) -> None:
        call = readable(call)
        # One kernel has them all, wanted or not.
        wanted = zip(grads[:3], (call.q, call.k, call.v), strict=True)
        found = (torch.empty_like(x) if grad is None else grad for grad, x in wanted)
        run.backward(call, *found, *grads[3:])

    return SimpleNamespace(
        forward=lambda call, *outputs: run.forward(readable(call), *outputs), backward=backward
    )


# --- triton: kernels/attention_fwd.py, attention_bwd.py, attention_jvp.py -------------------------


def _lacks_tensor_cores(q: Tensor) -> str | None:
    """The GPU, where Triton would multiply half precision in scalar units, out of registers."""
    if not q.is_cuda or q.dtype == torch.float32:
        return None
    if torch.version.hip:
        name = architecture_of(q.device.index)
        return None if name.startswith("gfx9") else name
    capability = capability_of(q.device.index)
    return f"sm_{capability}" if 0 < capability < 80 else None


def _triton_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    refusal = triton_refuses(call.q, requested, "q, k and v")
    if refusal is not None:
        return refusal
    if (lacking := _lacks_tensor_cores(call.q)) is not None:
        return Refusal(
            f"{lacking} multiplies {call.q.dtype} without tensor cores",
            "use float32, or another GPU",
        )
    widest = max(call.q.shape[3], call.v.shape[3])
    if widest > 512:
        return Refusal(f"head dim {widest} is above 512", "use at most 512")
    return None


def _triton_kernels() -> Any:
    from ..kernels.attention_bwd import attention_backward
    from ..kernels.attention_decode import attention_decode
    from ..kernels.attention_fwd import attention_forward
    from ..kernels.attention_jvp import attention_jvp

    def forward(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        (attention_decode if call.config.cached else attention_forward)(call, out, lse)

    return SimpleNamespace(forward=forward, backward=attention_backward, jvp=attention_jvp)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_refuses(call: AttentionCall, requested: bool) -> Refusal | None:
    return None


def formula(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The reference, differentiable to any order; half precision computes in float32."""
    q, k, v = (wide(x) for x in call[:3])
    with torch.autocast(q.device.type, enabled=False):
        if call.cu_seqlens_q is not None:
            out, lse = varlen.attention(q, k, v, **packed_options(call))
        elif call.config.cached:
            out, lse = cache.attention(q, k, v, block_table=call.block_table, **options(call))
        else:
            out, lse = reference.attention(q, k, v, **options(call), bias=added_bias(call))
    return out.to(call.q.dtype), lse


def backward_formula(call: AttentionBackwardCall) -> Outputs:
    """The gradients by the reference, those of q, k and v not rounded."""
    dout, q, k, v = (wide(x) for x in (call.dout, call.q, call.k, call.v))
    slopes, distance = call.alibi_slopes, call.distance_bias
    dbias = None
    with torch.autocast(call.q.device.type, enabled=False):
        if call.cu_seqlens_q is not None:
            *grads, slopes, dsinks, distance = varlen.attention_backward(
                dout, call.dlse, q, k, v, **packed_options(call)
            )
        else:
            *grads, ds, dsinks = reference.attention_backward(
                dout, call.dlse, q, k, v, **options(call), bias=added_bias(call)
            )
            step = rules.steps(q, k)
            if call.bias_grad:
                dbias = ds.sum_to_size(call.bias.shape)  # type: ignore[union-attr]
            if call.alibi_slopes_grad:
                slopes = -(ds * step.abs().to(ds.dtype)).sum_to_size(slopes.shape)  # type: ignore[union-attr]
            if call.distance_bias_grad:
                distance = rules.distance_bias_gradient(ds, distance, step, k.shape[2] - 1)  # type: ignore[arg-type]
    sinks = dsinks.sum_to_size(call.sinks.shape) if call.sinks_grad else None  # type: ignore[union-attr]
    found = (*grads, dbias, slopes, sinks, distance)
    return tuple(x if asked else None for x, asked in zip(found, call[21:28], strict=True))


def wide(x: Any) -> Any:
    return x.float() if x is not None and x.dtype in HALVES else x


def options(call: Any) -> dict[str, Any]:
    return {
        "mask": _mask(call),
        "kv_lengths": call.kv_lengths,
        "causal": call.config.causal_name,
        "window": call.config.window,
        "scale": call.config.scale,
        "softcap": call.config.softcap or None,
        "alibi_slopes": call.alibi_slopes,
        "sinks": call.sinks,
        "dropout_p": call.config.dropout_p,
        "seed": call.seed,
    }


def _mask(call: Any) -> Tensor | None:
    """The masks of a padded call as one."""
    if call.cu_seqlens_q is not None:
        return None
    seq_q, seq_k, found = call.q.shape[2], call.k.shape[2], []
    if call.mask is not None:
        found.append(call.mask)
    if call.prefix_lengths is not None:
        found.append(rules.prefix(call.prefix_lengths, rules.steps(call.q, call.k)))
    if call.documents_q is not None:
        found.append(rules.documents(call.documents_q, call.documents_k))
    if call.mask_blocks is not None:
        found.append(rules.blocks(call.mask_blocks, call.config.block_size, seq_q, seq_k))
    return functools.reduce(operator.and_, found) if found else None


def added_bias(call: Any) -> Tensor | None:
    """The biases of a padded call as one."""
    if call.distance_bias is None:
        return call.bias
    step = rules.steps(call.q, call.k)
    of_distances = rules.distance_bias(call.distance_bias, step, call.k.shape[2] - 1)
    return of_distances if call.bias is None else call.bias + of_distances


def packed_options(call: Any) -> dict[str, Any]:
    found = options(call)
    del found["mask"], found["kv_lengths"]
    names = ("cu_seqlens_q", "cu_seqlens_k", "distance_bias", "prefix_lengths")
    return found | {name: getattr(call, name) for name in names}


def _reference_kernels() -> Any:
    def contiguous(call: Any) -> Any:
        """BLAS picks its method by strides: a contiguous copy keeps them out of the result."""
        floats = ("dout", "q", "k", "v", "bias", "t_q", "t_k", "t_v", "t_bias")
        given = {name: getattr(call, name, None) for name in floats}
        return call._replace(
            **{name: wide(x).contiguous() for name, x in given.items() if x is not None}
        )

    def forward(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        for target, found in zip((out, lse), formula(contiguous(call)), strict=True):
            target.copy_(found)

    def backward(call: AttentionBackwardCall, *grads: Tensor | None) -> None:  # but of the sinks
        *of_scores, _, ddistance = backward_formula(contiguous(call))
        for target, found in zip(grads, (*of_scores, ddistance), strict=True):
            if target is not None:
                target.copy_(found)

    def jvp(call: AttentionJvpCall, *outputs: Tensor) -> None:
        from .attention_jvp import jvp_formula

        for target, found in zip(outputs, jvp_formula(contiguous(call)), strict=True):
            target.copy_(found)

    return SimpleNamespace(forward=forward, backward=backward, jvp=jvp)


BACKENDS = (
    Backend("cpu", _cpu_refuses, lambda: native_kernels(_native.cpu, "attention")),
    Backend("cuda", _cuda_refuses, lambda: _cuda_kernels(_native.cuda)),
    Backend("triton", _triton_refuses, _triton_kernels),
    Backend("cuda_emulated", _emulated_refuses, lambda: _cuda_kernels(_native.cuda_emulated())),
    Backend("reference", _reference_refuses, _reference_kernels),
)
