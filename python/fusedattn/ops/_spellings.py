"""What others call the arguments of attention, for the errors that say what stands here for it."""

from __future__ import annotations

from typing import Any, NoReturn

SPELLINGS = {
    "is_causal": "causal='top_left', which is what torch's is_causal means; causal=True lets the "
    "last query see every key, which differs where Sq != Sk",
    "attn_mask": "mask for a bool one (True = may attend), bias for one of floats",
    "enable_gqa": "neither it nor another option: Hq may be a multiple of Hkv",
    "softmax_scale": "scale",
    "window_size": "window=(left, right), with None where flash-attention has -1",
    "dropout": "dropout_p, which knows no evaluation: pass 0.0 there",
    "key_padding_mask": "mask=~key_padding_mask[:, None, None, :], for True means may attend here "
    "and blocked in torch's modules; or kv_lengths (B,), for padding at the end",
    "return_attn_probs": "return_lse, which also returns the log-sum-exp of each row; no backend "
    "stores the weights",
}
# Of these ops they say something else, or have names that `attention` has no use for.
VARLEN = {
    "attn_mask": "mask=fusedattn.masks.prefix(lengths), or bias, one of fusedattn.biases: a tensor "
    "of packed queries and keys would mostly be of pairs that are never seen",
    "key_padding_mask": "no padding: cu_seqlens_k says where each sequence ends",
    "kv_lengths": "no padding: cu_seqlens_k says where each sequence ends",
    "block_table": "attention_decode, which reads a cache in pages, with its block_table",
}
DECODE = {
    "is_causal": "causal, True by default: the last query sees every key, unlike torch's is_causal "
    "where Sq != Sk",
    "attn_mask": "mask, a bool one (True = may attend) over the room of the cache",
    "key_padding_mask": "lengths (B,), how many keys each sequence has",
    "cache_seqlens": "lengths",
    "kv_lengths": "lengths",
    "rotary_cos": "cos",
    "rotary_sin": "sin",
    "rotary_interleaved": "interleaved",
    "bias": "alibi_slopes or mask: a cache takes no bias",
    "dropout": "no dropout: nothing is trained on a cache",
    "dropout_p": "no dropout: nothing is trained on a cache",
    "return_softmax_lse": "return_lse",
    "num_splits": "neither it nor another option: how the keys are split is chosen by their number",
}
_OWN = {"attention_varlen": VARLEN, "attention_decode": DECODE}


def spellings(op: str) -> dict[str, str]:
    """What other libraries call an argument of the op, or give it beside → what stands here."""
    return SPELLINGS | _OWN.get(op, {})


def refuse_unknown(op: str, unknown: dict[str, Any]) -> NoReturn:
    """Raises TypeError, which of a name that others use says what stands here for it."""
    known = spellings(op)
    for name in unknown:
        if name in known:
            raise TypeError(f"{op}: got {name}, expected {known[name]}")
    raise TypeError(f"{op}: got an unknown keyword argument {next(iter(unknown))!r}")
