"""The checks on attention's tensors, made once before anything is launched."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    HALVES,
    INDICES,
    check_broadcast,
    check_device,
    check_like,
    check_probability,
    check_tensor,
    is_causal_bias,
)
from ._library import plain
from ._registry import is_strict
from .attention_config import AttentionBackwardCall, AttentionCall
from .attention_rules import Rules, validate_rules

TRANSPOSE = "; q, k and v that lie (B, S, H, D) are passed as their .transpose(1, 2)"


def autocast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Any, Tensor | None, Tensor | None]:
    """The floats of a call in autocast's dtype where it is on; q, k and v in float64 stay so.

    So does what is added to the scores in float32; of the heads it always is.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor("attention", name, x)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        if q.dtype == dtype:
            bias = unless_single(bias, dtype)
            alibi_slopes, sinks = (unless_single(x, torch.float32) for x in (alibi_slopes, sinks))
    return q, k, v, bias, alibi_slopes, sinks


def unless_single(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` in `dtype`: one in float32 is more exact, and one that is no float is an error."""
    floats = isinstance(x, Tensor) and x.dtype in (torch.float64, *HALVES)
    return x.to(dtype) if floats else x  # type: ignore[union-attr]


def is_learned(scale: Any) -> bool:
    """A tensor of scales; one number without a gradient is a number like any other."""
    return isinstance(scale, Tensor) and (scale.requires_grad or not _is_one(scale))


def _is_one(x: Tensor) -> bool:
    try:
        return x.dim() == 0
    except ValueError:  # not initialised yet
        return False


def scaled(
    q: Tensor, scale: Tensor, op: str = "attention", heads: int = -3
) -> tuple[Tensor, float]:
    """q times a tensor of scales of its heads, which are dimension `heads`, and what is left: 1.

    Kernels then know no scale of a head, and autograd sees to the gradient.
    """
    check_tensor(op, "q", q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    of_heads = (wide,) if q.dtype == wide else (q.dtype, wide)
    dtypes = FLOATS if _is_one(scale) else of_heads
    shape = check_tensor(op, "scale", scale, dtypes, "; or a float or None")
    check_device(op, "scale", scale, "q", q)
    of_head = shape == (q.shape[heads],) if q.dim() >= -heads else False
    if len(shape) != 0 and not of_head:
        own = q.shape[heads] if q.dim() >= -heads else "Hq"
        raise ValueError(
            f"{op}: got scale of shape {tuple(shape)}, expected a float, () or (Hq,) = ({own},)"
        )
    factor = scale.to(wide)
    if of_head:
        factor = factor.reshape(-1, *(1,) * (-heads - 1))
    return (q * factor).to(q.dtype), 1.0


def validate(q: Tensor, k: Tensor, v: Tensor, leading: bool = False) -> int:
    """Check q, k and v against each other; returns the head dim of q and k.

    leading: there may be other leading dimensions than one batch; then 0 is returned, and the rest
    was not checked.

    Raises:
        TypeError: not dense tensors, not floating point, or of different dtypes.
        ValueError: wrong rank, shapes that do not fit together, or different devices.
    """
    try:
        batch, heads, _, head_dim = q.shape
        batch_k, heads_kv, seq_k, head_dim_k = k.shape
        batch_v, heads_v, seq_v, head_dim_v = v.shape
        dense = q.dtype in FLOATS and q.layout is k.layout is v.layout is torch.strided
    except (AttributeError, RuntimeError, TypeError, ValueError):
        dense = False
    if not dense:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_rank(name, x, leading)
        if leading:
            return 0
    if not q.dtype is k.dtype is v.dtype:
        raise TypeError(
            f"attention: got q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype"
        )
    if not ((q.is_cpu and k.is_cpu and v.is_cpu) or q.device == k.device == v.device):
        raise ValueError(
            f"attention: got q, k, v on devices {q.device}, {k.device}, {v.device}, "
            "expected one device"
        )
    if not batch == batch_k == batch_v:
        if leading and {batch, batch_k, batch_v} == {1, max(batch, batch_k, batch_v)}:
            return 0
        raise ValueError(
            f"attention: got batch sizes {batch}, {batch_k}, {batch_v} of q, k, v, expected one"
        )
    if heads_v != heads_kv or seq_v != seq_k:
        raise ValueError(
            f"attention: got v of shape {tuple(v.shape)}, expected the batch, heads and length of "
            f"k, {tuple(k.shape[:3])}"
        )
    if head_dim_v == 0:
        raise ValueError(
            f"attention: got v of shape {tuple(v.shape)}, expected a head dim of at least 1"
        )
    if head_dim_k != head_dim or head_dim == 0:
        raise ValueError(
            f"attention: got head dims {head_dim} of q and {head_dim_k} of k, "
            "expected one head dim of at least 1"
        )
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv != 0):
        # All of them, k alone, q alone: the heads would fit.
        pairs = ((q.shape[2], seq_k), (heads, seq_k), (q.shape[2], heads_kv))
        swapped = any(keys != 0 and queries % keys == 0 for queries, keys in pairs)
        raise ValueError(
            f"attention: got {heads} query heads and {heads_kv} key heads, "
            f"expected a multiple (grouped queries){TRANSPOSE if swapped else ''}"
        )
    return head_dim


def _check_rank(name: str, x: Tensor, leading: bool) -> None:
    shape = check_tensor("attention", name, x)
    if len(shape) != 4 and not (leading and len(shape) >= 3):
        least = "3 dimensions or more (…, " if leading else "4 dimensions (batch, "
        raise ValueError(
            f"attention: got {name} of shape {tuple(shape)}, expected {least}heads, length, "
            "head_dim)"
        )


def _of_another_layout(given: Any, shape: Any) -> str:
    """What a mask that does not fit is likely to be meant for."""
    batch, heads, queries, keys = shape
    if tuple(given) == (batch, keys):
        return "; one of keys, (B, Sk), is passed as its [:, None, None, :]"
    if tuple(given) == (batch, queries, keys):
        return "; one for all heads, (B, Sq, Sk), is passed as its [:, None]"
    return TRANSPOSE if len(given) > 1 and given[-1] == heads else ""


def broadcastable(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`x` as a view of 4 dimensions, each 1 or that of the scores (B, Hq, Sq, Sk)."""
    check_device("attention", name, x, "q", q)
    shape = (*q.shape[:3], k.shape[2])
    check_broadcast("attention", name, x, shape, "(B, Hq, Sq, Sk) =", _of_another_layout)
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def replace_causal_bias(
    q: Tensor, k: Tensor, mask: Any, bias: Any, causal: bool | str
) -> tuple[Any, Any, bool | str]:
    """mask, bias and causal, where one of torch's CausalBias in place of the first two is the last.

    Raises:
        ValueError: it is for other lengths, or there is a `causal` already.
    """
    for name, x in (("mask", mask), ("bias", bias)):
        if type(x) is not Tensor and is_causal_bias(x):
            given: Any = x
            lengths, expected = (given.seq_len_q, given.seq_len_kv), (q.shape[2], k.shape[2])
            if lengths != expected:
                raise ValueError(
                    f"attention: got {name}, a CausalBias for lengths {lengths} of q and k, "
                    f"expected {expected}"
                )
            if causal is not False:
                raise ValueError(
                    f"attention: got causal={causal!r} and {name}, a CausalBias, expected one of "
                    "the two"
                )
            causal = {"UPPER_LEFT": "top_left", "LOWER_RIGHT": "bottom_right"}[given.variant.name]
            mask, bias = (None, bias) if name == "mask" else (mask, None)
    return mask, bias, causal


def validate_extras(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, kv_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check mask, bias and kv_lengths; the first two come back with 4 dimensions."""
    if mask is not None:
        remark = " (True = may attend); a float mask is passed as bias"
        check_tensor("attention", "mask", mask, (torch.bool,), remark)
        mask = broadcastable("mask", mask, q, k)
    if bias is not None:
        own = q.dtype in (torch.float32, torch.float64)
        dtypes = (q.dtype,) if own else (q.dtype, torch.float32)
        check_tensor("attention", "bias", bias, dtypes)
        bias = broadcastable("bias", bias, q, k)
    if kv_lengths is not None:
        shape = check_tensor("attention", "kv_lengths", kv_lengths, INDICES)
        check_device("attention", "kv_lengths", kv_lengths, "q", q)
        if shape != q.shape[:1]:
            raise ValueError(
                f"attention: got kv_lengths of shape {tuple(shape)}, expected ({q.shape[0]},)"
            )
    return mask, bias, kv_lengths


def validate_heads(name: str, x: Tensor, q: Tensor, batch: int | None = None) -> Tensor:
    """A number for each head, (Hq,) or with `batch` = B also (B, Hq), as (B or 1, Hq, 1, 1).

    In the dtype of the log-sum-exp; what has four dimensions already is of that shape.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtypes = (wide,) if q.dtype == wide else (q.dtype, wide)
    shape = check_tensor("attention", name, x, dtypes)
    check_device("attention", name, x, "q", q)
    heads = q.shape[1]
    expected: list[tuple[Any, ...]] = [(heads,), (1, heads, 1, 1)]
    if batch is not None:
        expected += [(batch, heads), (batch, heads, 1, 1)]
    if tuple(shape) not in expected:
        also = "" if batch is None else f" or (B, Hq) = {(batch, heads)}"
        raise ValueError(
            f"attention: got {name} of shape {tuple(shape)}, expected (Hq,) = {(heads,)}{also}"
        )
    if x.dtype is not wide:
        if plain(x) and x.numel() != 0 and x.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                f"attention: got {name} of shape {tuple(shape)} that has elements but no data: its "
                "storage was freed"
            )
        x = x.to(wide)
    return x if x.dim() == 4 else x[..., None, None] if x.dim() == 2 else x[None, :, None, None]


def validate_offsets(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """Check where packed sequences begin in q and k (1, H, total, D); returns how many there are.

    Values are looked at where no device must be waited for, and within `strict()`.
    """
    op = "attention_varlen"
    for name, x, rows in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[2]), ("cu_seqlens_k", cu_seqlens_k, k.shape[2])
    ):  # fmt: skip
        shape = check_tensor(op, name, x, INDICES)
        check_device(op, name, x, "q", q)
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"{op}: got {name} of shape {tuple(shape)}, expected (N + 1,) of N sequences"
            )
        asked = is_strict() and not torch.cuda.is_current_stream_capturing()
        if (x.is_cpu or asked) and plain(x):
            values = x.tolist()
            if values[0] != 0 or values[-1] > rows or any(map(operator.gt, values, values[1:])):
                first = ", ".join(map(str, values[:8])) + ", …" * (len(values) > 8)
                raise ValueError(
                    f"{op}: got {name} = [{first}], expected numbers that begin with 0, never fall "
                    f"and end with at most {rows}, the rows of {name[-1]}"
                )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: got cu_seqlens_q of {cu_seqlens_q.shape[0] - 1} sequences and cu_seqlens_k of "
            f"{cu_seqlens_k.shape[0] - 1}, expected one number"
        )
    return cu_seqlens_q.shape[0] - 1


def in_tables(q: Tensor, x: Tensor, block_table: Tensor | None) -> Tensor:
    """k or v as large as what its pages have room for, of no memory: its shape is what counts."""
    if block_table is None or x.dim() != 4:
        return x
    check_tensor("attention", "block_table", block_table, INDICES)
    check_device("attention", "block_table", block_table, "q", q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"attention: got block_table of shape {tuple(block_table.shape)}, expected (B, n) with "
            f"B = {q.shape[0]}"
        )
    _, heads, size, dim = x.shape
    return x.new_empty(()).expand(q.shape[0], heads, block_table.shape[1] * size, dim)


def _check_cache(call: AttentionCall) -> None:
    if not call.config.cached:
        if call.block_table is not None:
            raise ValueError("attention: got block_table without a cache, expected cached=True")
        return
    given = {x: getattr(call, x) for x in ("cu_seqlens_q", "cu_seqlens_k", "bias", "seed", *_RULES)}
    wrong = [name for name, x in given.items() if x is not None]
    if call.kv_lengths is None or wrong:
        raise ValueError(
            f"attention: got a cache {'with ' + wrong[0] if wrong else 'without kv_lengths'}, "
            "expected kv_lengths and no packed sequences, bias, dropout or rule"
        )
    if call.k.shape[0] != call.v.shape[0]:
        raise ValueError(
            f"attention: got {call.k.shape[0]} pages of keys and {call.v.shape[0]} of values, "
            "expected one number"
        )


_RULES = Rules._fields


def _sequences(call: AttentionCall) -> int:
    """How many a checked call has: packed in one batch entry, or one for each."""
    q, k, v = (call.q, *(in_tables(call.q, x, call.block_table) for x in call[1:3]))
    validate(q, k, v)
    _check_cache(call)
    if call.cu_seqlens_q is None and call.cu_seqlens_k is None:
        return q.shape[0]
    for name in ("mask", "bias", "kv_lengths", "documents_q", "documents_k", "mask_blocks"):
        if getattr(call, name) is not None:
            raise ValueError(f"attention: got {name} with cu_seqlens, expected one of the two")
    if q.shape[0] != 1:
        raise ValueError(f"attention: got q of shape {tuple(q.shape)}, expected a batch of 1")
    return validate_offsets(q, k, call.cu_seqlens_q, call.cu_seqlens_k)  # type: ignore[arg-type]


def check_call(call: AttentionCall) -> AttentionCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    q, k, _, mask, bias, kv_lengths, slopes, sinks = call[:8]
    sequences = _sequences(call)
    k = in_tables(q, k, call.block_table)
    validate_rules(Rules(*call[9:14]), call.config.block_size, q, k, sequences)
    mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
    if slopes is not None:
        slopes = validate_heads("alibi_slopes", slopes, q, sequences)
    if sinks is not None:
        sinks = validate_heads("sinks", sinks, q)
    if call.config.causal not in (0, 1, 2):
        raise ValueError(f"attention: got causal={call.config.causal}, expected 0, 1 or 2")
    seed = None
    if check_probability("attention", "dropout_p", call.config.dropout_p) != 0.0:
        seed = call.seed
        if seed is None:
            raise ValueError(
                f"attention: got dropout_p={call.config.dropout_p} without a seed, expected one"
            )
        check_like("attention", "seed", seed, (1,), torch.int64, q.device)
    return call._replace(
        mask=mask, bias=bias, kv_lengths=kv_lengths, alibi_slopes=slopes, sinks=sinks, seed=seed
    )


def check_backward_call(call: AttentionBackwardCall) -> AttentionBackwardCall:
    """The same for a call of the backward."""
    checked = check_call(call.forward)
    if call.config.cached:
        raise ValueError("attention_bwd: got a cache, which has no gradient, expected none")
    for name in ("bias", "alibi_slopes", "sinks", "distance_bias"):
        if getattr(call, f"{name}_grad") and getattr(call, name) is None:
            raise ValueError(f"attention_bwd: got {name}_grad=True without {name}, expected it")
    q, v = call.q, call.v
    wide = torch.float32 if q.dtype in HALVES else q.dtype
    shape, rows = (*q.shape[:3], v.shape[3]), q.shape[:3]
    for name, x, of, dtype in (
        ("dout", call.dout, shape, q.dtype), ("out", call.out, shape, q.dtype),
        ("dlse", call.dlse, rows, wide), ("lse", call.lse, rows, wide),
    ):  # fmt: skip
        if x is not None:
            check_like("attention_bwd", name, x, of, dtype, q.device)
    names = ("mask", "bias", "kv_lengths", "alibi_slopes", "sinks", "seed")
    return call._replace(**{name: getattr(checked, name) for name in names})
