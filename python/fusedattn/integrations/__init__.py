"""Adapters: what other libraries call, served by the ops here. Nothing is changed on import.

`sdpa` puts `torch.nn.functional.scaled_dot_product_attention` on them; `transformers` is one of the
attentions of Hugging Face's models; `flash_attn` is the interface of the flash-attn package. Each
but the first is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._sdpa_switch import sdpa

_LAZY = ("flash_attn", "transformers")
__all__ = ["sdpa", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
