"""The switch that puts the ops here in the place of torch's scaled_dot_product_attention.

Three places, each for what the one before does not reach:

1. F.scaled_dot_product_attention, a Python name, which dynamo guards: everything, and what is
   compiled has our op in its graph.
2. aten's composite op, for who has torch's function under another name, and for C++ and
   TorchScript. A graph that is being traced keeps aten's: caches on disk know it by its name, also
   for a process without us.
3. aten's flash attention on the CPU, which is what such graphs run: what flash takes.

Where torch has a list of flash attentions (2.13), it activates ours, and may put another in its
place.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import FLOATS, is_causal_bias
from ..ops.attention import op
from ..ops.attention_config import AttentionBackwardCall, AttentionCall, configure
from .sdpa import scaled_dot_product_attention

_NAME = "scaled_dot_product_attention"
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_torch_sdpa = torch._C._nn.scaled_dot_product_attention
_aten_sdpa = torch.ops.aten.scaled_dot_product_attention.default
_flash_enabled = torch._C._get_flash_sdp_enabled
_mode = torch._C._get_dispatch_mode
_transforms = torch._C._are_functorch_transforms_active
_TRACERS = [getattr(torch._C._TorchDispatchModeKey, x) for x in ("FAKE", "FUNCTIONAL", "PROXY")]

# --- the places ----------------------------------------------------------------------------------


def _takes(query: Any, key: Any, value: Any, attn_mask: Any) -> bool:
    """What is left to torch: other devices, dtypes and layouts, empty head dims, and all within an
    `sdpa_kernel` that names another backend than flash, whose place this is."""
    if not (_flash_enabled() and isinstance(query, Tensor) and query.dtype in FLOATS):
        return False
    if query.device.type not in ("cpu", "cuda"):
        return False
    if query.is_nested:
        return attn_mask is None and all(map(_is_jagged, (query, key, value)))
    return query.layout is torch.strided and query.dim() > 1 and query.shape[-1] != 0


def _is_jagged(x: Any) -> bool:
    return (
        isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged and x.dim() == 4
        and x._ragged_idx == 2 and x.lengths() is None  # type: ignore[attr-defined]
    )  # fmt: skip


def _patched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of F.scaled_dot_product_attention; who keeps it for longer gets torch's again."""
    if sdpa.enabled and _takes(query, key, value, attn_mask):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    before = _of_causal_bias(attn_mask) or sdpa.before
    return before(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of aten's composite op."""
    # A transform of torch.func is through with the call, of which it sees what torch's is made of.
    traced = _transforms() or any(_mode(key) is not None for key in _TRACERS)
    if not traced and _takes(query, key, value, attn_mask):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    before = _of_causal_bias(attn_mask) or _aten_sdpa.decompose
    return before(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _of_causal_bias(attn_mask: Any) -> Any:
    """What torch's CausalBias does where F's function is called, which it knows by its identity."""
    return type(attn_mask)._dispatch if is_causal_bias(attn_mask) else None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In place of aten's flash attention: out laid out as query, lse as (B, L, H)."""
    call = AttentionCall(
        query, key, value, bias=_of_4_dimensions(attn_mask),
        config=_configured(query, dropout_p, is_causal, scale),
    )  # fmt: skip
    with torch.no_grad():
        found: Any = op.library(call, op.choose("auto", call))
    out, lse = found
    like = torch.empty_like(query)
    out = out if out.stride() == like.stride() else like.copy_(out)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Of it, which has no gradient for the mask; each laid out as (B, L, H, E)."""
    call = AttentionBackwardCall(
        grad_out, None, out, logsumexp, query, key, value, bias=_of_4_dimensions(attn_mask),
        config=_configured(query, dropout_p, is_causal, scale),
    )  # fmt: skip
    backward: Any = op.backward
    with torch.no_grad():
        grads = backward.library(call, backward.choose("auto", call))[:3]
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads)


def _of_4_dimensions(attn_mask: Tensor | None) -> Tensor | None:
    return None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]


def _configured(query: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Any:
    if dropout_p != 0.0:  # aten takes this path without alone
        raise ValueError(f"{_FLASH}: got dropout_p={dropout_p}, expected 0.0")
    return configure(query.shape[-1], "top_left" if is_causal else False, scale)


# --- the switch ----------------------------------------------------------------------------------


class Sdpa:
    """The switch: `with sdpa(): …`, or `sdpa.enable()` and `sdpa.disable()`.

    While it is on, for the whole process, `torch.nn.functional.scaled_dot_product_attention` runs
    the kernels here, forward and backward, compiled too; so do in eager mode calls by another name
    or from C++ and TorchScript, and torch.nn's attention, whose path for inference, which calls no
    SDPA, is off. It is on within any `with` block and from `enable()` to `disable()`, however often
    that is called. Off, all is as it was found.

    Left to torch: devices, dtypes and layouts that are not ours; calls within an `sdpa_kernel` that
    names another backend than flash; of what is compiled or exported under a name that was imported
    from torch.nn.functional, what flash refuses.

    >>> import fusedattn, torch
    >>> q, k, v = torch.randn(3, 2, 8, 128, 64)
    >>> with fusedattn.integrations.sdpa():
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    """

    NAME = "fusedattn"  # in torch's list of flash attentions

    def __init__(self) -> None:
        self.enabled = False
        self.before: Any = _torch_sdpa
        self._lock = threading.RLock()
        self._asked = False
        self._blocks = 0
        self._library: torch.library.Library | None = None
        self._displaced: str | None = None
        self._fastpath = True

    def enable(self) -> None:
        """From now on, until `disable()`."""
        self._set(asked=True)

    def disable(self) -> None:
        """As before `enable()`; within a `with` block, from its end on."""
        self._set(asked=False)

    def __call__(self) -> Block:
        """A context manager: on within it. Blocks nest, also in several threads."""
        return Block(self)

    def _set(self, asked: bool | None = None, blocks: int = 0) -> None:
        with self._lock:
            self._asked = self._asked if asked is None else asked
            self._blocks += blocks
            wanted = self._asked or self._blocks > 0
            if wanted and not self.enabled:
                self._turn_on()
            elif self.enabled and not wanted:
                self._turn_off()

    def _turn_on(self) -> None:
        registry: Any = torch.nn.attention
        if not hasattr(registry, "register_flash_attention_impl"):  # torch before 2.13
            self._install()
            return
        self._displaced = registry.current_flash_attention_impl()
        registry.register_flash_attention_impl(self.NAME, register_fn=self._install)
        registry.activate_flash_attention_impl(self.NAME)

    def _turn_off(self) -> None:
        registry: Any = torch.nn.attention
        if not hasattr(registry, "register_flash_attention_impl"):
            self.remove()
            return
        registry.restore_flash_attention_impl()
        if self._displaced is not None:
            registry.activate_flash_attention_impl(self._displaced)

    def _install(self) -> Sdpa:
        """What torch calls to activate this; it keeps the result, and calls its `remove`."""
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously", UserWarning)
            for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
                library.impl(_NAME, _kernel, key)
            library.impl(_FLASH, _flash, "CPU")
            library.impl(f"{_FLASH}_backward", _flash_backward, "CPU")
        self._library = library
        _forget_resolved()
        self.before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _patched
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.jit._builtins._register_builtin(_patched, f"aten::{_NAME}")
        self.enabled = True
        return self

    def remove(self) -> None:
        """As it was. For torch's registry, also when another flash attention is activated."""
        self.enabled = self._asked = False
        if self._library is not None:
            self._library._destroy()
            self._library = None
            _forget_resolved()
        # Who has patched it since calls ours, which passes on what it finds.
        if F.scaled_dot_product_attention is _patched:
            F.scaled_dot_product_attention = self.before
        if not torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(self._fastpath)


def _forget_resolved() -> None:
    """Tracing remembers per op, in Python, which kernel there is for a dispatch key."""
    for name in (_NAME, _FLASH, f"{_FLASH}_backward"):
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()


class Block:
    """What `with sdpa():` enters; it may be entered again."""

    def __init__(self, switch: Sdpa) -> None:
        self._switch = switch

    def __enter__(self) -> None:
        self._switch._set(blocks=1)

    def __exit__(self, *exc: object) -> None:
        self._switch._set(blocks=-1)


sdpa = Sdpa()
