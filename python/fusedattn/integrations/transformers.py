"""Hugging Face transformers 5: `attn_implementation="fusedattn"`, once `register()` was called.

Two functions go into its registers. One makes the mask of a model from positions, padding and
packing, of bools, or None where it would be causal or nothing; it is transformers' own for SDPA.
The other is attention itself, whose arguments are, in ours:

    attention_mask  `mask` or, of floats, `bias`; without one `is_causal` holds, top-left, for more
                    than one query, since an empty static cache has keys after the last query
    position_bias   `bias`, with its gradient (T5), a tensor or, of a patched model, by rule
    s_aux           `sinks` (gpt-oss)
    scaling         `scale`                             softcap         `softcap` (Gemma 2)
    cu_seq_lens_q   `attention_varlen`, or one more mask
    sliding_window  nothing: the mask has it, as for eager attention, or it does not bind
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..biases import DistanceBias
from ..ops._checks import seed_tensor
from ..ops._registry import UnsupportedError
from ..ops.attention import attention
from ..ops.attention_varlen import attention_varlen
from ..reference.rules import steps

NAME = "fusedattn"

# --- what models call ----------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | DistanceBias | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, Tensor | None]:
    """One attention of a model, as `AttentionInterface` calls it.

    Args:
        module: it has `is_causal`, unless that is given.
        query: (B, H, Lq, D).
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv).
        attention_mask: (B or 1, H or 1, Lq or 1, Lk), bool or float, or None.
        scaling, dropout, is_causal, position_bias, softcap, s_aux: see above.
        further: `cu_seq_lens_q`, `cu_seq_lens_k`; `output_attentions`, for which the weights are
            computed; what else comes says nothing of a result.

    Returns:
        (B, Lq, H, Dv), contiguous, and the weights (B, H, Lq, Lk) after dropout, or None.
    """
    if further.get("sinks") is not None:
        raise UnsupportedError(
            f"{type(module).__name__}: sinks of each query are not supported; use "
            'attn_implementation="eager"'
        )
    if type(getattr(module, "config", None)) in _masked:
        is_causal = False
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options: dict[str, Any] = {
        "scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout
    }  # fmt: skip
    offsets = further.get("cu_seq_lens_q"), further.get("cu_seq_lens_k")
    asked = further.get("output_attentions", False)
    if isinstance(position_bias, DistanceBias) and _is_float(attention_mask):
        position_bias = _written_out(position_bias, query, key)
    mask, bias = _mask_and_bias(attention_mask, position_bias)
    if offsets[0] is not None:
        if not (asked or attention_mask is not None or bias is not None):
            return _packed(query, key, value, offsets, bool(is_causal), options), None
        same = _same_sequence(offsets, query.shape[2], key.shape[2])
        mask = same if mask is None else mask & same
    # A size first: under compile it is symbolic, and what is left is a bool.
    causal = "top_left" if query.shape[2] > 1 and attention_mask is None and is_causal else False
    options |= {"mask": mask, "bias": bias, "causal": causal}
    if asked and dropout != 0.0:
        options["seed"] = seed_tensor("attention", None, query)  # the same of both
    out: Any = attention(query, key, value, **options)
    weights = _weights(query, key, options) if asked else None
    return out.transpose(1, 2).contiguous(), weights


def _is_float(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def _mask_and_bias(attention_mask: Tensor | None, position_bias: Any) -> tuple[Any, Any]:
    if not _is_float(attention_mask):
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else position_bias + attention_mask


def _written_out(bias: DistanceBias, query: Tensor, key: Tensor) -> Tensor:
    """(1, H, Lq, Lk), the last query at the last key."""
    buckets = bias.buckets(steps(query, key))
    return bias.table.to(query.dtype)[buckets].permute(2, 0, 1)[None]


def _packed(
    query: Tensor, key: Tensor, value: Tensor, offsets: Any, causal: bool, options: dict[str, Any]
) -> Tensor:
    """Sequences one after the other in each batch entry, and these in turn."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out: Any = attention_varlen(
        *rows, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], causal=causal, **options
    )
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _same_sequence(offsets: Any, seq_q: int, seq_k: int) -> Tensor:
    """(Lq, Lk): whether a query and a key are of one sequence."""
    of_q, of_k = (
        torch.bucketize(torch.arange(n, device=ends.device), ends, right=True)
        for n, ends in zip((seq_q, seq_k), offsets, strict=True)
    )
    return of_q[:, None] == of_k


def _weights(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """What each key gives where its value is 1."""
    one = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    weights: Any = attention(query, key, one.expand(*key.shape[:2], -1, -1), **options)
    return weights


# --- registers -----------------------------------------------------------------------------------

# Model types that call the interface for a part of them; the others are wrong with a mask of bools.
OWN_ATTENTION = frozenset({"bigbird_pegasus", "git"})

# Methods of PreTrainedModel, and which of their arguments is the name of an attention.
_CHECKED = {
    "get_correct_attn_implementation": "requested_attention",
    "set_attn_implementation": "attn_implementation",
}
_before: dict[str, Callable[..., Any]] = {}  # what is theirs, while ours is registered

# They drop queries at the end of a prompt, whose place only a mask then tells.
CUTS_QUERIES = frozenset({"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"})

# Configs of these, and of models that transformers runs without SDPA, so that nobody has tried what
# they say of `is_causal`: they get a mask where they make one, as with eager attention.
_masked: set[type] = set()


def attention_mask(
    *,
    config: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **given: Any,
) -> Tensor | None:
    """(B, 1, Lq, Lk) of bools, or None where it would be causal, or nothing; as
    `AttentionMaskInterface` calls it."""
    allowed = type(config) not in _masked
    mask: Tensor | None = _before["sdpa_mask"](
        config=config,
        allow_is_causal_skip=allow_is_causal_skip and allowed,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and allowed,
        **given,
    )
    return mask


def register() -> None:
    """Make "fusedattn" one of the attentions of transformers; again, it does nothing.

    Then `from_pretrained(…, attn_implementation="fusedattn")`, `from_config` likewise, or
    `model.set_attn_implementation("fusedattn")`, which refuse, with a ValueError, models that do
    not call the interface. No model is changed by itself.

    Raises:
        ImportError: transformers is not there, or older than 5.
    """
    transformers = _import()
    if _before:
        return
    masks = importlib.import_module("transformers.masking_utils")
    _before["sdpa_mask"] = masks.sdpa_mask
    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)
    model = transformers.PreTrainedModel
    for name, argument in _CHECKED.items():
        _before[name] = getattr(model, name)
        setattr(model, name, _checked(_before[name], argument))


def unregister() -> None:
    """Take it back; models that use it must be given another attention first."""
    if not _before:
        return
    transformers = _import()
    for name in _CHECKED:
        setattr(transformers.PreTrainedModel, name, _before[name])
    _before.clear()
    _masked.clear()
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def _import() -> Any:
    transformers: Any = importlib.import_module("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f"fusedattn.integrations.transformers: got transformers {transformers.__version__}, "
            "expected 5 or later"
        )
    return transformers


def _checked(function: Callable[..., Any], argument: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = args[0] if args else kwargs.get(argument)
        if asked == NAME:
            _refuse_others(type(self), self.config)
            if not self._supports_sdpa or self.config.model_type in CUTS_QUERIES:
                _masked.add(type(self.config))
        return function(self, *args, **kwargs)

    return checked


def _refuse_others(model: Any, config: Any) -> None:
    """An error for a model that would compute attention itself, with our masks."""
    if config.model_type in OWN_ATTENTION or not model._can_set_attn_implementation():
        raise ValueError(
            f"{model.__name__}: got attn_implementation={NAME!r}, expected 'eager': this model "
            "computes attention in its own code and does not call transformers' AttentionInterface"
        )
