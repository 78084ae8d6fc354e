"""torch's transformers over the fused modules: stacks of layers, and an encoder with a decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..ops._checks import check_flag
from ._inputs import check_sizes, recorded, wrong
from .norm import LayerNorm
from .transformer_layers import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    added,
    check_decoder,
    check_features,
    check_masks,
    check_options,
    check_together,
    sizes,
)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`: a stack of copies of a layer, of ours or not.

    Where torch's drops padding (in evaluation, without gradients, with `src_key_padding_mask` alone
    over `batch_first` layers that norm after the sum), so does this one, and what is padding comes
    out as 0 before the last norm; compiled, with `mask_check=False`, too. It does not warn that it
    will not. A mask that is the causal one is found where torch's finds it, but not in what is
    compiled or exported, where `is_causal` has to say so, nor if it requires a gradient.

    Args:
        encoder_layer: the layer; it is copied.
        num_layers: how many copies.
        norm: after the last layer.
        enable_nested_tensor: whether to drop padding.
        mask_check: whether to do so only where the padding is seen to be at the ends.

    >>> import torch, fusedattn
    >>> layer = fusedattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    >>> encoder = fusedattn.nn.TransformerEncoder(layer, 2, fusedattn.nn.LayerNorm(64))
    >>> encoder(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        encoder_layer: torch.nn.Module,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        name = "TransformerEncoder"
        _check_stack(name, "encoder_layer", encoder_layer, num_layers, norm)
        check_flag(name, "enable_nested_tensor", enable_nested_tensor)
        check_flag(name, "mask_check", mask_check)
        layer: Any = encoder_layer
        super().__init__(layer, num_layers, norm, False, mask_check)  # True would warn
        self.enable_nested_tensor = enable_nested_tensor
        self.use_nested_tensor = enable_nested_tensor and _may_nest(layer)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The last layer's output, laid out as `src`.

        Args:
            src, mask, src_key_padding_mask: as for the layers.
            is_causal: promises that `mask` is the causal mask, or denies it; None looks at it.
        """
        if isinstance(src, Proxy):
            call = recorded(self, src, mask, src_key_padding_mask, is_causal)
            if call is not None:
                return call
        attn: Any = getattr(self.layers[0], "self_attn", None)
        batch_first: bool = getattr(attn, "batch_first", False)
        ours = all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers)
        if ours:
            name, width = "TransformerEncoder", getattr(attn, "embed_dim", None)
            check_features(name, "src", src, attn, width, nested=True)
            check_masks(
                name, src, src, attn, ("mask", mask),
                ("src_key_padding_mask", src_key_padding_mask), ("is_causal", is_causal),
            )  # fmt: skip
        causal = is_causal
        if causal is None:
            causal = not src.is_nested and _is_causal(mask, sizes(src, batch_first)[1])
        dropped = None if mask is not None else self._dropped(src, src_key_padding_mask)
        packs = dropped is not None and not torch.compiler.is_compiling()
        if not ours:  # they were written for torch's, which hands on masks of floats
            mask, src_key_padding_mask = (added(src, m) for m in (mask, src_key_padding_mask))
        output = src
        if dropped is not None and packs:
            output = torch._nested_tensor_from_mask(src, ~dropped, mask_check=False)
            src_key_padding_mask = None
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        if packs:
            output = output.to_padded_tensor(0.0, src.size())
        elif dropped is not None:
            output = output.masked_fill(dropped[..., None], 0.0)
        return output if self.norm is None else self.norm(output)

    def _dropped(self, src: Tensor, padding: Tensor | None) -> Tensor | None:
        """The positions that torch's encoder would leave out, going on with a nested tensor."""
        if padding is None or type(src) is not Tensor or src.dim() != 3 or src.is_nested:
            return None
        first, compiles = self.layers[0], torch.compiler.is_compiling()
        checks = getattr(self, "mask_check", True)
        if not getattr(self, "use_nested_tensor", False) or first.training or src.is_meta:
            return None
        if torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
            return None
        if torch.is_grad_enabled() and (
            src.requires_grad or any(p.requires_grad for p in first.parameters())
        ):
            return None
        if compiles and (checks or padding.dtype != torch.bool):
            return None
        if padding.dtype != torch.bool:
            blocked = padding == float("-inf")
            if not torch.equal(blocked, padding != 0.0):  # some of it is a bias
                return None
            padding = blocked
        aligned = not checks or torch._nested_tensor_from_mask_left_aligned(src, ~padding)
        return padding if aligned else None


class TransformerDecoder(torch.nn.TransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`: a stack of copies of a layer, of ours or not.

    >>> import torch, fusedattn
    >>> layer = fusedattn.nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)
    >>> decoder = fusedattn.nn.TransformerDecoder(layer, 2)
    >>> decoder(torch.randn(2, 10, 64), torch.randn(2, 30, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, decoder_layer: torch.nn.Module, num_layers: int, norm: torch.nn.Module | None = None
    ) -> None:
        _check_stack("TransformerDecoder", "decoder_layer", decoder_layer, num_layers, norm)
        layer: Any = decoder_layer
        super().__init__(layer, num_layers, norm)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The last layer's output; arguments as for the layers.

        tgt_is_causal: promises that `tgt_mask` is the causal mask, or denies it; None looks at it,
        but not in what is compiled or exported.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if isinstance(tgt, Proxy) or isinstance(memory, Proxy):
            call = recorded(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            if call is not None:
                return call
        first: Any = self.layers[0]
        batch_first: bool = getattr(getattr(first, "self_attn", None), "batch_first", False)
        if all(isinstance(layer, TransformerDecoderLayer) for layer in self.layers):
            own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            cross = (memory_mask, memory_key_padding_mask, memory_is_causal)
            check_decoder("TransformerDecoder", tgt, memory, first, own, cross)
        causal = tgt_is_causal
        if causal is None:
            causal = _is_causal(tgt_mask, sizes(tgt, batch_first)[1])
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(torch.nn.Transformer):
    """Drop-in for `torch.nn.Transformer`: same arguments, parameters and masks.

    Its encoder and its decoder are `fusedattn.nn.TransformerEncoder` and `TransformerDecoder`,
    unless others are given.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as for the layers.
        num_encoder_layers, num_decoder_layers: how many there are.
        custom_encoder, custom_decoder: modules in their place, called with torch's keywords.

    >>> import torch, fusedattn
    >>> model = fusedattn.nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    >>> tgt_mask = model.generate_square_subsequent_mask(10)
    >>> src, tgt = torch.randn(2, 30, 64), torch.randn(2, 10, 64)
    >>> model(src, tgt, tgt_mask=tgt_mask, tgt_is_causal=True).shape
    torch.Size([2, 10, 64])

    Raises:
        TypeError, ValueError: as for the layers.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(
            "Transformer", d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps,
            dtype, batch_first=batch_first, norm_first=norm_first, bias=bias,
        )  # fmt: skip
        counts = {"num_encoder_layers": num_encoder_layers}
        counts |= {"num_decoder_layers": num_decoder_layers}
        customs = (custom_encoder, custom_decoder)
        for (name, count), custom in zip(counts.items(), customs, strict=True):
            if custom is None:
                check_sizes("Transformer", **{name: count})
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias,
        )  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, **where)

        encoder, decoder = customs
        if encoder is None:
            one = TransformerEncoderLayer(*layer, **where)
            encoder = TransformerEncoder(one, num_encoder_layers, norm())
        if decoder is None:
            other = TransformerDecoderLayer(*layer, **where)
            decoder = TransformerDecoder(other, num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output, laid out as `tgt`; E = d_model, S the length of src, T of tgt.

        Args:
            src, tgt: (S, N, E) and (T, N, E), with batch_first (N, S, E) and (N, T, E), or
                unbatched (S, E) and (T, E).
            src_mask, tgt_mask, memory_mask: (S, S), (T, T) and (T, S), or with N·H of them; True
                means *blocked*, floats are added to the scores.
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: (N, S), (N, T) and
                (N, S), unbatched without N.
            src_is_causal, tgt_is_causal, memory_is_causal: promise that the mask is causal, or deny
                it; None looks at it.

        Raises:
            TypeError, ValueError: arguments that do not fit the weights or each other.
        """
        paddings = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
        masks = (src_mask, tgt_mask, memory_mask, *paddings)
        causal: Any = (src_is_causal, tgt_is_causal, memory_is_causal)
        if isinstance(src, Proxy) or isinstance(tgt, Proxy):
            call = recorded(self, src, tgt, *masks, *causal)
            if call is not None:
                return call
        self._check(src, tgt, masks, causal)
        return super().forward(src, tgt, *masks, *causal)

    def _check(self, src: Tensor, tgt: Tensor, masks: Any, causal: Any) -> None:
        """All arguments by their names here; what others stand in for is theirs to check."""
        name = "Transformer"
        for each, x in (("src", src), ("tgt", tgt)):
            check_features(name, each, x, None, self.d_model)
        check_together(name, tgt, "src", src, self.batch_first)
        if type(self.encoder) is TransformerEncoder:
            attn = getattr(self.encoder.layers[0], "self_attn", None)
            check_masks(
                name, src, src, attn, ("src_mask", masks[0]), ("src_key_padding_mask", masks[3]),
                ("src_is_causal", causal[0]),
            )  # fmt: skip
        if type(self.decoder) is TransformerDecoder:
            own, cross = (masks[1], masks[4], causal[1]), (masks[2], masks[5], causal[2])
            check_decoder(name, tgt, src, self.decoder.layers[0], own, cross)


# --- what the stacks share -----------------------------------------------------------------------


def _check_stack(owner: str, name: str, layer: Any, num_layers: Any, norm: Any) -> None:
    if not isinstance(layer, torch.nn.Module):
        raise wrong(owner, TypeError, name, f"of type {type(layer).__name__}", "a Module")
    check_sizes(owner, num_layers=num_layers)
    if norm is not None and not isinstance(norm, torch.nn.Module):
        raise wrong(owner, TypeError, "norm", f"of type {type(norm).__name__}", "a Module")


def _may_nest(layer: Any) -> bool:
    """Whether torch's encoder would nest the inputs of layers such as this one."""
    if not isinstance(layer, torch.nn.TransformerEncoderLayer) or layer.norm_first:
        return False
    attn = layer.self_attn
    return (
        attn.batch_first
        and attn._qkv_same_embed_dim
        and attn.in_proj_bias is not None
        and layer.activation_relu_or_gelu != 0
        and layer.norm1.eps == layer.norm2.eps
        and attn.num_heads % 2 == 0
    )


def _is_causal(mask: Tensor | None, length: int) -> bool:
    """Whether the mask is the causal one, so that nobody need read it."""
    if mask is None or mask.shape != (length, length) or torch.compiler.is_compiling():
        return False
    if mask.requires_grad or mask.is_meta:
        return False
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length, mask.device, mask.dtype)
    return torch.equal(mask, causal)
