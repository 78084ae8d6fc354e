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
}


def refuse_unknown(op: str, unknown: dict[str, Any]) -> NoReturn:
    """Raises TypeError, which of a name that others use says what stands here for it."""
    for name in unknown:
        if name in SPELLINGS:
            raise TypeError(f"{op}: got {name}, expected {SPELLINGS[name]}")
    raise TypeError(f"{op}: got an unknown keyword argument {next(iter(unknown))!r}")
