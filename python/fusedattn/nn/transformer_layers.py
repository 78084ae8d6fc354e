"""The layers of torch's transformers over the fused modules, and what they share with the stacks.

A layer adds each of its blocks to a stream, with a norm after the sum or before the block:

    norm after     x ← norm(x + dropout(block(x)))
    norm_first     x ← x + dropout(block(norm(x)))

The dropout, the sum and the norm that follows it are one pass, `layer_norm(block, residual=x)`, and
so with `norm_first` is every norm but the first (Vaswani et al. 2017; Xiong et al. 2020). A nested
tensor goes through all but attention as the rows that it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ..ops._checks import check_flag, check_number, check_probability
from ..ops.layer_norm import layer_norm
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
from .attention import MultiheadAttention
from .norm import LayerNorm

Activation = str | Callable[[Tensor], Tensor]

# --- layers --------------------------------------------------------------------------------------


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer`: same arguments, parameters and masks.

    Its parts have torch's names and are called as modules, so that adapters, hooks, pruning and
    parametrizations find what they find in torch's. Where one of the norms or dropouts is watched
    by hooks, or is no longer what it was, the sum is taken in passes of their own; a subclass that
    defines `_sa_block` or `_ff_block` has them called. torch's inference path is never taken. A
    query whose keys are all blocked attends to nothing, and bool masks stay bool. Bad arguments
    raise `ValueError` or `TypeError`.

    Args:
        d_model, nhead: features and heads; d_model is a multiple of nhead.
        dim_feedforward: features between the two linear layers.
        dropout: probability of dropping, while training, an attention weight, an element of a
            block's output or one between the two linear layers.
        activation: "relu", "gelu" or a function of one tensor.
        layer_norm_eps: added to the variance.
        batch_first: whether batched tensors are (N, L, E) rather than (L, N, E).
        norm_first: whether norms come before the blocks rather than after the sums.
        bias: whether linear layers and norms have biases.
        device, dtype: of the parameters; fp16, bf16, fp32 or fp64.

    >>> import torch, fusedattn
    >>> layer = fusedattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])

    Raises:
        TypeError: sizes that are no integers, an activation that is no function, another dtype.
        ValueError: sizes that are not positive or do not fit, dropout outside [0, 1], an unknown
            name of an activation.
    """

    self_attn: Any
    norm1: Any
    norm2: Any

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(
            "TransformerEncoderLayer", d_model, nhead, dim_feedforward, dropout, activation,
            layer_norm_eps, dtype, batch_first=batch_first, norm_first=norm_first, bias=bias,
        )  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _fuse_parts(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, laid out as `src`.

        In both masks True means *blocked* and floats are added to the scores, with gradient, as in
        `fusedattn.nn.MultiheadAttention`; the two may be of different kinds.

        Args:
            src: (L, N, E), with batch_first (N, L, E), or unbatched (L, E). With batch_first also
                nested, strided or jagged, without masks.
            src_mask: (L, L) or (N·H, L, L).
            src_key_padding_mask: (N, L), or (L,) unbatched.
            is_causal: promises that `src_mask`, which must be given, is the causal mask; its
                values are then not read.

        Raises:
            TypeError, ValueError: arguments that do not fit the weights or each other.
        """
        if isinstance(src, Proxy):
            call = recorded(self, src, src_mask, src_key_padding_mask, is_causal)
            if call is not None:
                return call
        if not _has_blocks(self, torch.nn.TransformerEncoderLayer):
            return self._forward_by_blocks(src, src_mask, src_key_padding_mask, is_causal)
        name, attn = "TransformerEncoderLayer", self.self_attn
        check_features(name, "src", src, attn, getattr(attn, "embed_dim", None), nested=True)
        check_masks(
            name, src, src, attn, ("src_mask", src_mask),
            ("src_key_padding_mask", src_key_padding_mask), ("is_causal", is_causal),
        )  # fmt: skip
        x, back = src, None
        if src.is_nested:
            found = rows(src, 1) if isinstance(attn, MultiheadAttention) else None
            if found is None:
                return self._forward_by_blocks(src, src_mask, src_key_padding_mask, is_causal)
            x, back = found
        masks: dict[str, Any] = {
            "attn_mask": src_mask,
            "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        if self.norm_first:
            block = _self_attention(attn, self.norm1(x), back, masks)
            y, x = _add_norm(block, x, self.dropout1, self.norm2, keep_dtype=False)
            x = x + self.dropout2(_feed_forward(self, y))
        else:
            block = _self_attention(attn, x, back, masks)
            x, _ = _add_norm(block, x, self.dropout1, self.norm1)
            x, _ = _add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)
        return x if back is None else back(x)

    def _forward_by_blocks(
        self, src: Tensor, src_mask: Any, src_key_padding_mask: Any, is_causal: bool
    ) -> Tensor:
        """As torch's: blocks that a subclass or the caller has put there get masks of floats."""
        mask, padding = (added(src, m) for m in (src_mask, src_key_padding_mask))
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer`: same arguments, parameters and masks.

    What `fusedattn.nn.TransformerEncoderLayer` says of its parts, subclasses, masks and arguments
    holds here; a subclass may define `_mha_block` too.

    >>> import torch, fusedattn
    >>> layer = fusedattn.nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)
    >>> layer(torch.randn(2, 10, 64), torch.randn(2, 30, 64)).shape
    torch.Size([2, 10, 64])
    """

    self_attn: Any
    multihead_attn: Any
    norm1: Any
    norm2: Any
    norm3: Any

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(
            "TransformerDecoderLayer", d_model, nhead, dim_feedforward, dropout, activation,
            layer_norm_eps, dtype, batch_first=batch_first, norm_first=norm_first, bias=bias,
        )  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _fuse_parts(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, laid out as `tgt`.

        Args:
            tgt: (T, N, E), with batch_first (N, T, E), or unbatched (T, E).
            memory: what the queries of `tgt` attend to, of length S, laid out likewise.
            tgt_mask, memory_mask: (T, T) and (T, S), or with N·H of them.
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), unbatched without N.
            tgt_is_causal, memory_is_causal: promise that the mask, which must be given, is causal:
                query i sees keys 0 to i.

        Raises:
            TypeError, ValueError: arguments that do not fit the weights or each other.
        """
        if isinstance(tgt, Proxy) or isinstance(memory, Proxy):
            call = recorded(
                self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            if call is not None:
                return call
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if not _has_blocks(self, torch.nn.TransformerDecoderLayer):
            return self._forward_by_blocks(tgt, memory, own, cross)
        check_decoder("TransformerDecoderLayer", tgt, memory, self, own, cross)
        kinds = ("attn_mask", "key_padding_mask", "is_causal")
        on_tgt, on_memory = (dict(zip(kinds, each, strict=True)) for each in (own, cross))
        x, across = tgt, self.multihead_attn
        if self.norm_first:
            block = _self_attention(self.self_attn, self.norm1(x), None, on_tgt)
            y, x = _add_norm(block, x, self.dropout1, self.norm2, keep_dtype=False)
            block = across(y, memory, memory, need_weights=False, **on_memory)[0]
            y, x = _add_norm(block, x, self.dropout2, self.norm3, keep_dtype=False)
            return x + self.dropout3(_feed_forward(self, y))
        block = _self_attention(self.self_attn, x, None, on_tgt)
        x, _ = _add_norm(block, x, self.dropout1, self.norm1)
        block = across(x, memory, memory, need_weights=False, **on_memory)[0]
        x, _ = _add_norm(block, x, self.dropout2, self.norm2)
        return _add_norm(_feed_forward(self, x), x, self.dropout3, self.norm3)[0]

    def _forward_by_blocks(self, tgt: Tensor, memory: Tensor, own: Any, cross: Any) -> Tensor:
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own)
            x = x + self._mha_block(self.norm2(x), memory, *cross)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own))
        x = self.norm2(x + self._mha_block(x, memory, *cross))
        return self.norm3(x + self._ff_block(x))


# --- blocks, and the sums that follow them -------------------------------------------------------


def _fuse_parts(layer: torch.nn.Module) -> None:
    """Of torch's parts, which drew their parameters as torch's layer does, the fused ones."""
    for part in layer.children():
        if type(part) is torch.nn.LayerNorm:
            part.__class__ = LayerNorm
        elif type(part) is torch.nn.MultiheadAttention:
            part.__class__ = MultiheadAttention


def _has_blocks(layer: torch.nn.Module, of: type) -> bool:
    """Whether the layer's blocks are those of torch's class `of`, which computes what we do."""
    names = [name for name in ("_sa_block", "_mha_block", "_ff_block") if hasattr(of, name)]
    return all(
        getattr(getattr(layer, name), "__func__", None) is getattr(of, name) for name in names
    )


def _bare(module: torch.nn.Module, kind: type) -> bool:
    """Whether a call of `module` is what `kind` computes and nobody looks on."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def _self_attention(attn: Any, x: Tensor, back: Any, masks: dict[str, Any]) -> Tensor:
    """Of x, or of the rows x of the nested tensor that `back` makes of them."""
    if back is None:
        return attn(x, x, x, need_weights=False, **masks)[0]
    nested = back(x)
    found = rows(attn(nested, nested, nested, need_weights=False, **masks)[0], 1)
    assert found is not None
    return found[0]


def _add_norm(
    block: Tensor, x: Tensor, dropout: Any, norm: Any, keep_dtype: bool = True
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) with z = x + dropout(block).

    Under autocast x may be wider than the block. The norm has the dtype of z, as with torch, or
    with `keep_dtype` False that of the block, which is the one that the next product takes.
    """
    own = _bare(norm, LayerNorm) and norm.dropout_p == 0.0 and norm.residual_dtype is None
    if not (own and _bare(dropout, torch.nn.Dropout)):
        z = x + dropout(block)
        return norm(z), z
    if x.dtype != block.dtype:
        dtype = torch.promote_types(x.dtype, block.dtype)
        x, block = x.to(dtype), block.to(dtype) if keep_dtype else block
    p = dropout.p if dropout.training else 0.0
    out: Any = layer_norm(
        block, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=x, dropout_p=p
    )
    return out


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    hidden, activation = layer.linear1(x), layer.activation
    if not torch.is_grad_enabled() and _bare(layer.linear1, torch.nn.Linear):
        if activation is F.relu:  # nobody else has it
            activation = torch.relu_
        elif activation is F.gelu:
            activation = torch.ops.aten.gelu_
    return layer.linear2(layer.dropout(activation(hidden)))


def added(src: Tensor, mask: Any) -> Any:
    """The mask in floats: −inf where a bool one is True."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros_like(mask, dtype=src.dtype)
    return zeros.masked_fill_(mask, float("-inf"))


# --- checks --------------------------------------------------------------------------------------


def check_options(
    owner: str, d_model: Any, nhead: Any, dim_feedforward: Any, dropout: Any, activation: Any,
    layer_norm_eps: Any, dtype: Any, **flags: Any,
) -> None:  # fmt: skip
    """Those of a layer."""
    check_sizes(owner, d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward)
    check_probability(owner, "dropout", dropout)
    check_number(owner, "layer_norm_eps", layer_norm_eps)
    check_dtype(owner, dtype)
    for name, flag in flags.items():
        check_flag(owner, name, flag)
    if isinstance(activation, str):
        if activation not in ("relu", "gelu"):
            raise ValueError(f"{owner}: got activation={activation!r}, expected 'relu' or 'gelu'")
    elif not callable(activation):
        got = f"of type {type(activation).__name__}"
        raise wrong(owner, TypeError, "activation", got, "'relu', 'gelu' or a function")
    if d_model % nhead != 0:
        raise ValueError(
            f"{owner}: got d_model={d_model} and nhead={nhead}, expected d_model a multiple of "
            "nhead"
        )


def sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """The batch, 1 if there is none, and the length."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def check_features(
    owner: str, name: str, x: Any, attn: Any, width: int | None, nested: bool = False
) -> None:
    """x is a sequence or a batch of some, of `width` features; what `attn` is made for."""
    if is_nested(x) and nested:
        return  # attention says what it expects of it
    weight = None
    if type(attn) is MultiheadAttention:  # else it may be computed, or be elsewhere
        weight = attn.q_proj_weight if attn.in_proj_weight is None else attn.in_proj_weight
    check_input(owner, name, x, weight)
    if x.dim() not in (2, 3):
        wanted = "(L, features), or 3 dimensions with a batch"
        raise wrong(owner, ValueError, name, f"of shape {tuple(x.shape)}", wanted)
    if width is not None and x.shape[-1] != width:
        wanted = f"{width} features in the last dimension"
        raise wrong(owner, ValueError, name, f"of shape {tuple(x.shape)}", wanted)


def check_together(owner: str, tgt: Tensor, name: str, other: Tensor, batch_first: bool) -> None:
    """Two sequences have a batch of one size or none."""
    batch, _ = sizes(tgt, batch_first)
    if other.dim() != tgt.dim() or sizes(other, batch_first)[0] != batch:
        dim = 0 if batch_first else 1
        wanted = f"a batch of {batch} in dimension {dim}, as tgt" if tgt.dim() == 3 else "no batch"
        raise wrong(owner, ValueError, name, f"of shape {tuple(other.shape)}", wanted)


def check_masks(
    owner: str, x: Tensor, keys: Tensor, attn: Any, mask: tuple[str, Any],
    padding: tuple[str, Any], causal: tuple[str, Any],
) -> None:  # fmt: skip
    """The masks of queries x over `keys` and the promise about the first, each with its name."""
    if causal[1] is not None and check_flag(owner, *causal) and mask[1] is None:
        got, wanted = f"without {mask[0]}", f"the causal {mask[0]} too"
        raise wrong(owner, ValueError, f"{causal[0]}=True", got, wanted)
    given = [each for each in (mask, padding) if each[1] is not None]
    if not given or not isinstance(attn, torch.nn.MultiheadAttention):
        return
    if x.is_nested:
        raise wrong(owner, ValueError, given[0][0], "with a nested tensor", "no mask")
    (batch, queries), (_, length) = sizes(x, attn.batch_first), sizes(keys, attn.batch_first)
    if mask[1] is not None:
        both = (queries, length)
        check_mask(owner, *mask, both, (batch * attn.num_heads, *both))
    if padding[1] is not None:
        check_mask(owner, *padding, (batch, length) if x.dim() == 3 else (length,))


def check_decoder(
    owner: str, tgt: Tensor, memory: Tensor, layer: Any, own: Any, cross: Any
) -> None:
    """The arguments of a decoder; own and cross are the masks, the padding and the promise."""
    attn, across = layer.self_attn, layer.multihead_attn
    check_features(owner, "tgt", tgt, attn, getattr(attn, "embed_dim", None))
    check_features(owner, "memory", memory, across, getattr(across, "kdim", None))
    check_together(owner, tgt, "memory", memory, getattr(attn, "batch_first", False))
    kinds = ("mask", "key_padding_mask", "is_causal")
    for of, keys, module, given in (("tgt", tgt, attn, own), ("memory", memory, across, cross)):
        names = [f"{of}_{kind}" for kind in kinds]
        check_masks(owner, tgt, keys, module, *zip(names, given, strict=True))
