"""`torch.nn.functional.scaled_dot_product_attention` by the op here; `_sdpa_switch` puts it there.

In torch's words to ours: attn_mask is `mask` or, of floats, `bias`; is_causal is
`causal="top_left"`; enable_gqa is always on in `attention`, so that without it heads that differ
are refused. Where torch broadcasts heads, they are expanded as a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._checks import check_broadcast, check_flag, is_causal_bias
from ..ops._library import hand_over, has_override, is_overridden
from ..ops.attention import attention
from ..ops.attention_shapes import leading_shape

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: its arguments, and what it computes.

    It differs where torch's paths differ among each other: attn_mask and is_causal may be given
    together, a key is then seen if both say so; a query that sees no key gets 0; dropout costs no
    memory, and what it drops follows from torch's generator, but is not what torch drops.

    Args:
        query: (…, Hq, L, E), of 2 dimensions or more, which broadcast as in torch; float16,
            bfloat16, float32 or float64.
        key: (…, H, S, E).
        value: (…, H, S, Ev).
        attn_mask: broadcastable to (…, Hq, L, S): bool, True = may attend, or float, added to the
            scores, with its gradient, in the dtype of query or float32.
        dropout_p: probability of dropping a weight; pass 0.0 in evaluation.
        is_causal: query i sees keys 0 … i, whatever L and S are (top-left).
        scale: of the scores; E**-0.5 by default.
        enable_gqa: Hq may be a multiple of H.
        backend: as in `fusedattn.attention`.

    Returns:
        (…, Hq, L, Ev) in the dtype of query, laid out as (…, L, Hq, Ev), so that merging the heads
        is a view; on a CPU contiguous where query is.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call.

    >>> import torch, fusedattn
    >>> q, k, v = torch.randn(3, 2, 8, 128, 64)
    >>> fusedattn.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 8, 128, 64])
    """
    if has_override(query, key, value, attn_mask):
        given = locals()
        if is_overridden(given):
            return hand_over(scaled_dot_product_attention, given)
    flat = False
    if not _fit(query, key, value):
        flat = max(_rank(query), _rank(key), _rank(value)) == 2
        query, key, value = (_with_heads(x) for x in (query, key, value))
        if not query.is_nested:
            query, key, value = _matching_heads(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        mask, bias = _mask_and_bias(query, key, value, attn_mask)
    if is_causal is not False:
        is_causal = check_flag(_NAME, "is_causal", is_causal)
    causal = "top_left" if is_causal else False
    out: Any = attention(
        query, key, value, mask=mask, bias=bias, causal=causal, scale=scale, dropout_p=dropout_p,
        backend=backend,
    )  # fmt: skip
    if out.is_cpu and query.is_contiguous():  # as torch's kernel there: its callers may view it
        out = out.contiguous()
    return out[0] if flat else out


def _fit(query: Any, key: Any, value: Any) -> bool:
    """Whether they are what most calls have: (B, H, L, E), with as many heads."""
    try:
        return (
            query.dim() == key.dim() == value.dim() == 4
            and query.shape[1] == key.shape[1] == value.shape[1]
        )
    except (AttributeError, TypeError):
        return False


def _rank(x: Any) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{_NAME}: got a {type(x).__name__} among query, key, value, expected Tensors"
        )
    return x.dim()


def _with_heads(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 2 else x


def _matching_heads(
    query: Tensor, key: Tensor, value: Tensor, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as `attention` has them; one head of any of the three is for all of the others."""
    try:
        heads = [x.shape[-3] for x in (query, key, value)]
    except IndexError:  # of one dimension: for `attention` to refuse
        return query, key, value
    if heads[0] == heads[1] == heads[2] or check_flag(_NAME, "enable_gqa", grouped):
        return query, key, value
    most = max(heads)
    if any(n not in (1, most) for n in heads):
        raise ValueError(
            f"{_NAME}: got {heads[0]}, {heads[1]} and {heads[2]} heads of query, key and value, "
            "expected one number, or enable_gqa=True and a multiple of those of key and value"
        )
    if heads[0] == most and heads[1] == heads[2]:
        return query, key, value
    shapes = (x.shape for x in (query, key, value))
    wide = [(*shape[:-3], most, *shape[-2:]) for shape in shapes]
    return query.expand(wide[0]), key.expand(wide[1]), value.expand(wide[2])


def _mask_and_bias(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if is_causal_bias(attn_mask):
        return attn_mask, None
    if not isinstance(attn_mask, Tensor):
        kind = type(attn_mask).__name__
        raise TypeError(f"{_NAME}: got attn_mask of type {kind}, expected a Tensor or None")
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        raise TypeError(
            f"{_NAME}: got attn_mask of dtype {attn_mask.dtype}, expected bool (True = may attend) "
            "or a float that is added to the scores"
        )
    if not query.is_nested:
        scores = (*leading_shape(query, key, value), *query.shape[-3:-1], key.shape[-2])
        check_broadcast(_NAME, "attn_mask", attn_mask, scores, "(…, Hq, L, S) =")
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    exact = query.dtype == torch.float64 and attn_mask.dtype == torch.float32
    return None, attn_mask.double() if exact else attn_mask
