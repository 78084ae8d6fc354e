"""Attention's options and the checks on its arguments, made once before anything is launched."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    HALVES,
    INDICES,
    check_broadcast,
    check_causal,
    check_device,
    check_flag,
    check_integer,
    check_like,
    check_number,
    check_probability,
    check_tensor,
    is_causal_bias,
)


class AttentionConfig(NamedTuple):
    """The options of one call, in the order of the library ops' schemas.

    causal: 0 none, 1 top-left, 2 bottom-right. deterministic: no gradient is a sum in an order that
    changes from call to call. softcap: 0 for none. window: keys seen to the left and to the right
    of the diagonal, −1 for unbounded.

    The schema is in exported programs, so that what is to come has its place already: no backend
    takes dropout or one of these yet. max_seqlen_q, max_seqlen_k: of packed
    sequences, 0 where nobody knows. table_kind: what `bias_table` is indexed by, 0 none, 1 T5's
    buckets, 2 those of a decoder, 3 clipped distances; table_distance: from there on all are one.
    block_size: queries and keys of an entry of `mask_blocks`.
    """

    causal: int = 0
    scale: float = 1.0
    deterministic: bool = False
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    dropout_p: float = 0.0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    table_kind: int = 0
    table_distance: int = 0
    block_size: int = 0

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """The public spelling of `window_left` and `window_right`."""
        left, right = (None if x < 0 else x for x in (self.window_left, self.window_right))
        return None if left is None and right is None else (left, right)

    @property
    def causal_name(self) -> bool | str:
        """The public spelling of `causal`."""
        return (False, "top_left", "bottom_right")[self.causal]


class AttentionCall(NamedTuple):
    """One call: mask and bias of four dimensions, each 1 or that of the scores (B, Hq, Sq, Sk).

    From alibi_slopes on no backend takes them yet: slopes, sinks and scales of the heads, the
    dropout's seed, a (buckets, Hq) table of biases, lengths of prefixes (B,), documents (B, S) of
    queries and keys, which blocks are seen, the offsets of packed sequences, and the pages of a
    cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    seed: Tensor | None = None
    bias_table: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    config: AttentionConfig = AttentionConfig()


class AttentionBackwardCall(NamedTuple):
    """The gradients of out and lse, either None for zero, with what the forward had and gave.

    <tensor>_grad: its gradient is wanted; those of q, k and v always are.
    """

    dout: Tensor | None
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    seed: Tensor | None = None
    bias_table: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    bias_grad: bool = False
    alibi_slopes_grad: bool = False
    sinks_grad: bool = False
    scales_grad: bool = False
    bias_table_grad: bool = False
    config: AttentionConfig = AttentionConfig()

    @property
    def forward(self) -> AttentionCall:
        """The call whose gradient this is."""
        return AttentionCall(*self[4:22], self.config)


def configure(
    head_dim: int,
    causal: bool | str = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> AttentionConfig:
    """Check the options and fill in the defaults."""
    op = "attention"
    try:
        left, right = (None, None) if window is None else window
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"{op}: got window of type {type(window).__name__}, expected (left, right)"
        ) from None
    left, right = _side(left), _side(right)
    if left < -1 or right < -1:
        raise ValueError(f"{op}: got window={window}, expected sides >= 0 or None")
    expected = "a float or None"
    cap = 0.0 if softcap is None else check_number(op, "softcap", softcap, expected)
    if softcap is not None and not 1e-30 <= cap <= 1e30:  # and so in float32
        raise ValueError(f"{op}: got softcap={softcap}, expected a float of 1e-30 to 1e30 or None")
    return AttentionConfig(
        check_causal(op, causal),
        head_dim**-0.5 if scale is None else check_number(op, "scale", scale, expected),
        check_flag(op, "deterministic", deterministic),
        cap,
        left,
        right,
        check_probability(op, "dropout_p", dropout_p),
    )


def _side(side: int | None) -> int:
    """−1 for None, and what is below 0 below that."""
    if side is None:
        return -1
    side = check_integer("attention", "window", side, "(left, right), each an int or None")
    return side if side >= 0 else -2


remembered = functools.lru_cache(maxsize=256)(configure)


def autocast(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and bias in autocast's dtype where it is on; what is float64 stays as it is."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor("attention", name, x)
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    # A bias in float32 is more exact, and one that is not floating point is an error.
    if q.dtype == dtype and isinstance(bias, Tensor) and bias.dtype in (torch.float64, *HALVES):
        bias = bias.to(dtype)
    return q, k, v, bias


def validate(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check q, k and v against each other; returns the head dim of q and k.

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
            _check_rank(name, x)
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
        raise ValueError(
            f"attention: got {heads} query heads and {heads_kv} key heads, "
            "expected a multiple (grouped queries)"
        )
    return head_dim


def _check_rank(name: str, x: Tensor) -> None:
    shape = check_tensor("attention", name, x)
    if len(shape) != 4:
        raise ValueError(
            f"attention: got {name} of shape {tuple(shape)}, expected 4 dimensions "
            "(batch, heads, length, head_dim)"
        )


def _broadcastable(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`x` as a view of 4 dimensions, each 1 or that of the scores (B, Hq, Sq, Sk)."""
    check_device("attention", name, x, "q", q)
    check_broadcast("attention", name, x, (*q.shape[:3], k.shape[2]), "(B, Hq, Sq, Sk) =")
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def replace_causal_bias(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool | str
) -> tuple[Tensor | None, Tensor | None, bool | str]:
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
        mask = _broadcastable("mask", mask, q, k)
    if bias is not None:
        own = q.dtype in (torch.float32, torch.float64)
        dtypes = (q.dtype,) if own else (q.dtype, torch.float32)
        check_tensor("attention", "bias", bias, dtypes)
        bias = _broadcastable("bias", bias, q, k)
    if kv_lengths is not None:
        shape = check_tensor("attention", "kv_lengths", kv_lengths, INDICES)
        check_device("attention", "kv_lengths", kv_lengths, "q", q)
        if shape != q.shape[:1]:
            raise ValueError(
                f"attention: got kv_lengths of shape {tuple(shape)}, expected ({q.shape[0]},)"
            )
    return mask, bias, kv_lengths


def check_call(call: AttentionCall) -> AttentionCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    q, k, v, mask, bias, kv_lengths = call[:6]
    validate(q, k, v)
    mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
    if call.config.causal not in (0, 1, 2):
        raise ValueError(f"attention: got causal={call.config.causal}, expected 0, 1 or 2")
    return call._replace(mask=mask, bias=bias, kv_lengths=kv_lengths)


def check_backward_call(call: AttentionBackwardCall) -> AttentionBackwardCall:
    """The same for a call of the backward."""
    checked = check_call(call.forward)
    if call.bias_grad and call.bias is None:
        raise ValueError("attention_bwd: got bias_grad=True without a bias, expected one")
    q, v = call.q, call.v
    wide = torch.float32 if q.dtype in HALVES else q.dtype
    shape, rows = (*q.shape[:3], v.shape[3]), q.shape[:3]
    for name, x, of, dtype in (
        ("dout", call.dout, shape, q.dtype), ("out", call.out, shape, q.dtype),
        ("dlse", call.dlse, rows, wide), ("lse", call.lse, rows, wide),
    ):  # fmt: skip
        if x is not None:
            check_like("attention_bwd", name, x, of, dtype, q.device)
    return call._replace(mask=checked.mask, bias=checked.bias, kv_lengths=checked.kv_lengths)
