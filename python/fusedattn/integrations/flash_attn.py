"""The interface of the flash-attn package, version 2.8, by the ops here; on a CPU too.

Names, arguments, defaults, layouts and return values are that package's: tensors (B, S, H, D), a
causal mask and windows that end at the last query and key. `install()` puts it in place as the
module `flash_attn`, for code that imports that name.

In its words to ours: softmax_scale is `scale`, window_size (left, right) is `window` with -1 for
None, softcap 0.0 is None. It differs where that package does: any head dim and number of heads
that `attention` takes, float32 too, and dropout that drops other weights for a seed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import seed_tensor
from ..ops.attention import attention
from ..ops.attention_varlen import attention_varlen
from . import _flash_attn_cache, _flash_attn_parts
from ._flash_attn_cache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache", "install", "uninstall",
]  # fmt: skip

VERSION = "2.8.3"  # whose interface this is

# --- padded batches ------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv).

    Args:
        alibi_slopes: (Hq,) or (B, Hq), float32: -slope · |i + Sk - Sq - j| is added to the scores.
        return_attn_probs: return (out, lse, probabilities) in place of out: lse (B, Hq, Sq), +inf
            for a query that sees no key; probabilities (B, Hq, Sq, Sk) with dropout alone, else
            None, below 0 where they were dropped. For tests: they take Sq · Sk memory.

    Returns:
        out (B, Sq, Hq, Dv).

    Raises:
        TypeError, ValueError: the arguments do not fit together; see `fusedattn.attention`.
    """
    options = _flash_attn_cache.options_of(softmax_scale, causal, window_size, softcap)
    options |= {"alibi_slopes": alibi_slopes, "deterministic": deterministic or None}
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": seed_tensor("flash_attn", None, q)}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(q, k, v, **options, return_lse=True)
    out = out.transpose(1, 2)
    if not return_attn_probs:
        return out
    return out, _flash_attn_cache.positive(lse), _probabilities(q, k, options)


def _probabilities(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor | None:
    if "seed" not in options:
        return None
    one = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    with torch.no_grad():
        dropped: Any = attention(q, k, one, **options)
        whole: Any = attention(q, k, one, **{**options, "dropout_p": 0.0, "seed": None})
    return torch.where(dropped == 0, -whole, whole)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of kv (B, Sk, 2, Hkv, D), which is read as it is."""
    k, v = _parts("kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D), which is read as it is."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _parts(name: str, x: Tensor, dimensions: int, count: int) -> tuple[Tensor, ...]:
    if not isinstance(x, Tensor) or x.dim() != dimensions or x.shape[-3] != count:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        lead = "(B, S" if dimensions == 5 else "(total"
        raise ValueError(
            f"flash_attn: got {name} {got}, expected {lead}, {count}, heads, head dim)"
        )
    return x.unbind(-3)


# --- packed sequences ----------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv).

    Args:
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32, where each sequence begins.
        block_table: (N, pages) int32: k and v are (all pages, page size, Hkv, D), and the keys of a
            sequence are in these of them. They are copied together, and cu_seqlens_k is read.
        return_attn_probs: return (out, lse, None) in place of out, lse (Hq, total_q).

    Returns:
        out (total_q, Hq, Dv).

    Raises:
        TypeError, ValueError: see `fusedattn.attention_varlen`.
    """
    if block_table is not None:
        rows = _flash_attn_cache.rows_of_pages(cu_seqlens_k, block_table, k.shape[1], k.shape[0])
        k, v = (x.flatten(0, 1)[rows] for x in (k, v))
    options = _flash_attn_cache.options_of(softmax_scale, causal, window_size, softcap)
    found = attention_varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, alibi_slopes=alibi_slopes,
        deterministic=deterministic or None, dropout_p=dropout_p, return_lse=True, **options,
    )  # fmt: skip
    out, lse = found
    return (out, _flash_attn_cache.positive(lse), None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of kv (total_k, 2, Hkv, D), which is read as it is."""
    k, v = _parts("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D), which is read as it is."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


# --- as the module flash_attn --------------------------------------------------------------------

_PUBLIC = __all__[:-2]
_MODULES: dict[str, dict[str, Any]] = {
    "": {name: globals()[name] for name in _PUBLIC} | {"__version__": VERSION},
    "flash_attn_interface": {name: globals()[name] for name in _PUBLIC},
    "bert_padding": _flash_attn_parts.BERT_PADDING,
    "layers": {},
    "layers.rotary": _flash_attn_parts.ROTARY,
    "ops": {},
    "ops.rms_norm": _flash_attn_parts.RMS_NORM,
}
_installed: dict[str, types.ModuleType] = {}


def install() -> None:
    """Make `import flash_attn` find this interface, until `uninstall()`; again, it does nothing.

    Raises:
        ImportError: there is a flash-attn already, installed or imported.
    """
    if _installed:
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise ImportError(
            "fusedattn.integrations.flash_attn.install: got a flash_attn that is installed, "
            "expected none: it is never replaced"
        )
    for path, names in _MODULES.items():
        name = f"flash_attn.{path}".rstrip(".")
        module = types.ModuleType(name, __doc__)
        package = path in ("", "layers", "ops")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
        if package:
            module.__path__ = []
        vars(module).update(names)
        _installed[name] = sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def uninstall() -> None:
    """Take `flash_attn` away again, if it is this one; what was imported from it stays usable."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()
