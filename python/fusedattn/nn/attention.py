"""Multi-head attention as a module: `torch.nn.MultiheadAttention` over the fused op.

With E = embed_dim, H = num_heads and D = E / H, per head h:

    out = Σ_h softmax(q_h k_hᵀ / √D + mask) v_h · W_out[h],    q, k, v = x W_in + b_in

The projections are torch's; the heads are views of their results, (N, L, H, D) read as
(N, H, L, D), so nothing is copied on the way to the kernel (Vaswani et al. 2017, §3.2.2).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..ops._checks import check_flag, check_probability
from ..ops._registry import UnsupportedError, is_strict
from ..ops.attention import attention
from ..ops.attention_config import configure
from ..ops.attention_varlen import attention_varlen
from ..reference import functional as reference
from ._inputs import (
    check_dtype,
    check_input,
    check_mask,
    check_sizes,
    is_nested,
    recorded,
    rows,
    wrong,
)
from .positional import alibi_slopes


def _called_in_evaluation(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that changes nothing: it has torch's encoder layers call their modules."""


_NESTED = (
    "with a nested tensor batch_first=True, query is key is value, each sequence (L, E), and "
    "neither masks nor is_causal"
)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same arguments, parameters and mask conventions.

    It differs from torch's in five things. It never builds the (L, S) weights unless they are asked
    for. A query whose keys are all blocked gets weights 0 and attends to nothing, never NaN. Inside
    `torch.nn.TransformerEncoderLayer` it runs in evaluation too, where that layer would bypass its
    attention module; a forward pre-hook that does nothing sees to that. Nested tensors are taken in
    both layouts, while training and with gradients too. Bad arguments raise `ValueError` or
    `TypeError`, not `AssertionError`.

    Dropout acts on the weights, in the kernel, by a seed from torch's generator. Only where
    `need_weights` asks for them while training with `dropout > 0` are they built in full by plain
    PyTorch, as torch draws them, which `fusedattn.strict()` forbids: memory grows with L·S. In
    evaluation dropout costs nothing.

    Args:
        embed_dim, num_heads: E and H; E is a multiple of H.
        dropout: probability of dropping an attention weight while training, in [0, 1].
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value to every sequence.
        add_zero_attn: append a key and a value of zeros to every sequence.
        kdim, vdim: features of key and value; E by default.
        batch_first: whether batched tensors are (N, L, E) rather than (L, N, E).
        device, dtype: of the parameters; fp16, bf16, fp32 or fp64.
        window: (left, right), how many keys a query sees to either side of the diagonal that ends
            at the last key, either None for all.
        softcap: c, scores become c · tanh(score / c), before masks of floats are added.
        alibi: whether −slope · distance is added, with the slopes of Press et al. 2022.
        sinks: whether each head has one learned logit more in its softmax, that gives no value: the
            parameter `sinks` (H,), zero at first.
        rotary: turns queries and keys before they meet, as a `fusedattn.nn.RotaryEmbedding(D)`:
            called with q (N, H, L, D) and k (N, H, S, D), it returns both.

    From `window` on they are not torch's. A module without them has torch's `state_dict`.

    >>> import torch, fusedattn
    >>> rotary = fusedattn.nn.RotaryEmbedding(16)
    >>> layer = fusedattn.nn.MultiheadAttention(
    ...     64, 4, batch_first=True, window=(127, 0), sinks=True, rotary=rotary)
    >>> x = torch.randn(2, 300, 64)
    >>> layer(x, x, x, need_weights=False)[0].shape
    torch.Size([2, 300, 64])

    Raises:
        TypeError: sizes that are no integers, a dropout that is no number, another dtype.
        ValueError: sizes that are not positive, E not a multiple of H, dropout outside [0, 1]; a
            window or softcap that `attention` refuses; appended keys, which have no place, with
            what depends on places.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi: bool = False,
        sinks: bool = False,
        rotary: torch.nn.Module | None = None,
    ) -> None:
        name = "MultiheadAttention"
        check_sizes(name, embed_dim=embed_dim, num_heads=num_heads)
        check_sizes(name, **{k: n for k, n in (("kdim", kdim), ("vdim", vdim)) if n is not None})
        check_probability(name, "dropout", dropout)
        check_dtype(name, dtype)
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"{name}: got embed_dim={embed_dim} and num_heads={num_heads}, expected embed_dim "
                "a multiple of num_heads"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self._add_options(window, softcap, alibi, sinks, rotary)
        self._keep_off_torch_fast_path()

    def _add_options(
        self, window: Any, softcap: float | None, alibi: bool, sinks: bool, rotary: Any
    ) -> None:
        name = "MultiheadAttention"
        alibi, sinks = check_flag(name, "alibi", alibi), check_flag(name, "sinks", sinks)
        configure(self.head_dim, window=window, softcap=softcap)
        if rotary is not None and not isinstance(rotary, torch.nn.Module):
            raise _wrong(TypeError, "rotary", f"of type {type(rotary).__name__}", "a Module")
        placed = window is not None or alibi or rotary is not None
        if placed and (self.bias_k is not None or self.add_zero_attn):
            wanted = "neither add_bias_kv nor add_zero_attn: those keys have no place"
            raise _wrong(ValueError, "window, alibi or rotary", "with appended keys", wanted)
        # Only what is given is there: a twin of torch's has none of them.
        own = {"window": window, "softcap": softcap, "rotary": rotary}
        for option, value in own.items():
            if value is not None:
                setattr(self, option, value)
        like = self.out_proj.weight
        if alibi:
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            slopes = alibi_slopes(self.num_heads).to(like.device, wide)
            self.register_buffer("alibi_slopes", slopes, persistent=False)
        if sinks:
            self.sinks = torch.nn.Parameter(like.new_zeros(self.num_heads))

    def _options(self) -> dict[str, Any]:
        """Those of `attention` that are the module's own."""
        options = {name: getattr(self, name, None) for name in _OPTIONS}
        return {name: x for name, x in options.items() if x is not None}

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """The fused twin of `module`. It shares the parameters, so optimizers stay valid.

        Raises:
            TypeError: `module` is no `torch.nn.MultiheadAttention`.
        """
        if not isinstance(module, torch.nn.MultiheadAttention):
            got = f"of type {type(module).__name__}"
            raise _wrong(TypeError, "module", got, "a torch.nn.MultiheadAttention")
        twin: Any = copy.copy(module)
        # Its own dicts of parameters and hooks, with what stands in them.
        vars(twin).update({k: copy.copy(v) for k, v in vars(twin).items() if isinstance(v, dict)})
        twin.__class__ = cls
        twin._keep_off_torch_fast_path()
        return twin

    def _keep_off_torch_fast_path(self) -> None:
        # TransformerEncoderLayer computes itself from our weights in evaluation, without calling
        # us. Of what makes it step aside, only a hook on one of its modules says what we mean: that
        # they are to be called. All else are facts about the weights, which others read as well.
        # TransformerEncoder looks at no hook: it still makes padded batches nested tensors.
        if _called_in_evaluation not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_called_in_evaluation)

    def _let_torch_fast_path(self) -> None:
        hooks = self._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _called_in_evaluation]:
            del hooks[key]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        In both masks True means *blocked* and floats are added to the scores, with gradient; the
        two may be of different kinds. This is torch's convention here, and the opposite of
        `fusedattn.attention`.

        Args:
            query: (L, N, E), with batch_first (N, L, E), or unbatched (L, E). With batch_first also
                nested, strided or jagged: then all three are one tensor, without masks.
            key, value: (S, N, kdim) and (S, N, vdim), laid out likewise. Passing one tensor as
                all three, or as key and value, projects it in one product.
            key_padding_mask: (N, S), or (S,) unbatched; bool or float.
            need_weights: also return the weights, after dropout; but while training with it the
                output costs the same, they come on top.
            attn_mask: (L, S) or (N·H, L, S); bool or float.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: promises that `attn_mask`, which must be given, is the causal mask; its
                values are then not read unless keys are appended.

        Returns:
            The output, laid out as `query`, and the weights, (N, L, S) or (N, H, L, S) without N
            when unbatched; None in their place without `need_weights`. S counts appended keys.

        Raises:
            TypeError: an argument that is no tensor, or not of the weights' dtype where autocast
                does not see to it; a mask neither bool nor floating.
            ValueError: shapes or devices that do not fit, or `is_causal` without `attn_mask`.
            UnsupportedError: training with dropout and `need_weights` within `fusedattn.strict()`.
        """
        if isinstance(query, Proxy) or isinstance(key, Proxy):
            call = recorded(
                self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            if call is not None:
                return call
        if is_nested(query):
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        _check(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        rotary = getattr(self, "rotary", None)
        if rotary is not None:
            q, k = rotary(q, k)
        k, v = self._append_keys(k, v)
        appended = k.shape[2] - key.shape[_length_dim(self, key)]
        causal: bool | str = "top_left" if is_causal and not appended else False
        mask, bias = self._merge(q, key_padding_mask, None if causal else attn_mask, appended)

        out: Any
        weights: Tensor | None = None
        dropout, options = self.dropout if self.training else 0.0, self._options()
        if need_weights and dropout > 0.0:
            if is_strict():
                raise UnsupportedError(
                    f"MultiheadAttention: dropout={dropout} while training builds the weights that "
                    "need_weights asks for in plain PyTorch, and strict() forbids it; pass "
                    "need_weights=False, or set dropout to 0"
                )
            weights = F.dropout(_attention_weights(q, k, mask, bias, causal, **options), dropout)
            out = torch.matmul(weights, v)
        else:
            out = attention(
                q, k, v, mask=mask, bias=bias, causal=causal, dropout_p=dropout, **options
            )
            if need_weights:
                weights = _attention_weights(q, k, mask, bias, causal, **options)
        out = self.out_proj(self._join_heads(out, batched=query.dim() == 3))
        if weights is None or not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if query.dim() == 3 else weights[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, their last dimension split into (H, D); one product for inputs that agree.

        By torch.unflatten: dynamo does not trace Tensor.unflatten under a default device.
        """
        heads = (self.num_heads, self.head_dim)
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key and key is value:
            return torch.unflatten(F.linear(query, weight, bias), -1, (3, *heads)).unbind(-3)
        b_q, b_k, b_v = (None,) * 3 if bias is None else bias.chunk(3)
        if weight is not None and key is value:
            b_kv = None if bias is None else bias[width:]
            q, kv = F.linear(query, weight[:width], b_q), F.linear(key, weight[width:], b_kv)
            kv = torch.unflatten(kv, -1, (2, *heads))
            return torch.unflatten(q, -1, heads), *kv.unbind(-3)
        if weight is not None:
            w_q, w_k, w_v = weight.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        inputs = ((query, w_q, b_q), (key, w_k, b_k), (value, w_v, b_v))
        return tuple(torch.unflatten(F.linear(x, w, b), -1, heads) for x, w, b in inputs)

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (N, H, L, D) of (L, H, D), (N, L, H, D) or (L, N, H, D)."""
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, H, L, D) back to (L, E), (N, L, E) or (L, N, E)."""
        if not batched:
            return x[0].transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v, (N, H, S, D), with the learned key and the zero key after the last."""
        one = (k.shape[0], self.num_heads, 1, self.head_dim)
        more_k: list[Tensor] = []
        more_v: list[Tensor] = []
        if self.bias_k is not None and self.bias_v is not None:
            more_k.append(self.bias_k.view(1, *one[1:]).expand(one).to(k.dtype))
            more_v.append(self.bias_v.view(1, *one[1:]).expand(one).to(v.dtype))
        if self.add_zero_attn:
            more_k.append(k.new_zeros(one))
            more_v.append(v.new_zeros(one))
        if not more_k:
            return k, v
        return torch.cat([k, *more_k], 2), torch.cat([v, *more_v], 2)

    def _merge(
        self, q: Tensor, padding: Tensor | None, attn_mask: Tensor | None, appended: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The op's `mask` (True = may attend) and `bias` from torch's two masks."""
        parts = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = torch.unflatten(attn_mask, 0, (q.shape[0], self.num_heads))
            parts.append(attn_mask)
        if padding is not None:
            parts.append(padding[..., None, None, :])
        blocked = bias = None
        for part in parts:
            if part.dtype == torch.bool:
                blocked = part if blocked is None else blocked | part
            else:
                bias = part if bias is None else bias + part
        mask = None if blocked is None else ~blocked
        if bias is not None and bias.dtype != q.dtype:
            bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        if appended:  # every query sees the appended keys
            mask = None if mask is None else F.pad(mask, (0, appended), value=True)
            bias = None if bias is None else F.pad(bias, (0, appended))
        return mask, bias

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any,
        need_weights: bool, attn_mask: Any, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Self-attention over a nested tensor, which is how `TransformerEncoder` drops padding."""
        same = query is key and key is value
        plain = key_padding_mask is None and attn_mask is None and not is_causal
        found = rows(query, 1) if self.batch_first and same and plain else None
        if found is None or query.dim() != 3:
            raise _wrong(ValueError, "query", "that is nested", _NESTED)
        values, back = found
        if query.layout is torch.jagged:
            lengths = query.offsets().diff()  # type: ignore[attr-defined]
            packed = query.lengths() is None  # type: ignore[attr-defined]
        else:
            lengths, packed = query._nested_tensor_size()[:, 0].to(values.device), True
        appended = self.bias_k is not None or self.add_zero_attn
        if packed and not (need_weights or appended or hasattr(self, "rotary")):
            _check(self, values, values, values, None, None, is_causal=False)
            q, k, v = self._project(values, values, values)
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            out: Any = attention_varlen(
                q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets,
                dropout_p=self.dropout if self.training else 0.0, **self._options(),
            )  # fmt: skip
            return back(self.out_proj(out.flatten(-2))), None
        sequence = torch.arange(len(lengths), device=values.device)
        sequence = sequence.repeat_interleave(lengths, output_size=len(values))
        first = lengths.cumsum(0) - lengths
        position = torch.arange(len(values), device=values.device) - first[sequence]
        padded = query.to_padded_tensor(0.0)
        blocked = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        out, weights = self.forward(
            padded, padded, padded, blocked, need_weights, None, average_attn_weights
        )
        if weights is not None:  # as in torch, 0 for the queries that are padding
            nobody = blocked[..., None] if average_attn_weights else blocked[:, None, :, None]
            weights = weights.masked_fill(nobody, 0.0)
        return back(out[sequence, position]), weights


_OPTIONS = ("window", "softcap", "alibi_slopes", "sinks")


def _attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool | str,
    **options: Any,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ / √D + bias) in full, (N, H, L, S); 0 for a query that sees no key."""
    if options:  # what each key gives where its value is 1
        one = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        for name in ("alibi_slopes", "sinks"):
            if name in options:
                options[name] = options[name].to(q.dtype)[None, :, None, None]
        return reference.attention(q, k, one, mask=mask, bias=bias, causal=causal, **options)[0]
    seen = reference.visible_keys(q, k, mask=mask, causal=causal)
    s = reference.scores(q, k, q.shape[-1] ** -0.5, bias, seen).to(q.dtype)
    if mask is None and bias is None:  # then every query sees the first key
        return torch.softmax(s, -1)
    # An all -inf row would be NaN, and 0·NaN in its gradient: softmax it as zeros, then drop it.
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _length_dim(module: MultiheadAttention, x: Tensor) -> int:
    return 1 if x.dim() == 3 and module.batch_first else 0


def _check(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool,
) -> None:  # fmt: skip
    """Check the arguments of `forward` against each other and the module's sizes."""
    widths = (module.embed_dim, module.kdim, module.vdim)
    before: Any = module  # which is no argument
    for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        if x is not before:  # most calls pass one tensor as all three
            _check_tensor(module, name, x)
            before = x
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            wanted = "(L, features), or 3 dimensions with a batch, the same for all three"
            raise _wrong(ValueError, name, f"of shape {tuple(x.shape)}", wanted)
        if x.shape[-1] != width:
            wanted = f"{width} features in the last dimension"
            raise _wrong(ValueError, name, f"of shape {tuple(x.shape)}", wanted)
    if value is not key and key.shape[:-1] != value.shape[:-1]:
        wanted = f"the batch and length of key, {tuple(key.shape[:-1])}"
        raise _wrong(ValueError, "value", f"of shape {tuple(value.shape)}", wanted)
    dim, batched = _length_dim(module, query), query.dim() == 3
    if key is not query and batched and key.shape[1 - dim] != query.shape[1 - dim]:
        wanted = f"the batch size of query, {query.shape[1 - dim]}, in dimension {1 - dim}"
        raise _wrong(ValueError, "key", f"of shape {tuple(key.shape)}", wanted)
    if is_causal and attn_mask is None:
        raise _wrong(ValueError, "is_causal=True", "without attn_mask", "the causal attn_mask too")
    if key_padding_mask is None and attn_mask is None:
        return
    length, length_k = query.shape[dim], key.shape[dim]
    batch = query.shape[1 - dim] if batched else 1
    padding_shape: tuple[int, ...] = (batch, length_k) if batched else (length_k,)
    mask_shapes = ((length, length_k), (batch * module.num_heads, length, length_k))
    if key_padding_mask is not None:
        check_mask("MultiheadAttention", "key_padding_mask", key_padding_mask, padding_shape)
    if attn_mask is not None:
        check_mask("MultiheadAttention", "attn_mask", attn_mask, *mask_shapes)


def _check_tensor(module: MultiheadAttention, name: str, x: Tensor) -> None:
    """Check x against the weights."""
    weight = module.in_proj_weight
    weight = module.q_proj_weight if weight is None else weight
    check_input("MultiheadAttention", name, x, weight, _NESTED)


def _wrong(error: type[Exception], name: str, got: str, expected: str) -> Exception:
    return wrong("MultiheadAttention", error, name, got, expected)
