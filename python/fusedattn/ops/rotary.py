"""Rotary embedding: each pair of features turns by an angle that grows with the position.

For pair i of the first R features, (a, b) = x[…, (i, i + R/2)] or, interleaved, (2i, 2i + 1):

    (a, b) → (a·cos − b·sin, b·cos + a·sin)      cos, sin = the tables' row of the position

The features from R on pass unchanged (Su et al. 2021). The map is linear and orthogonal up to the
tables' length, so the gradient is the rotation by −angle: nothing of x is kept, and the backward is
the same op with `inverse`, differentiable to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_flag, check_in_place, check_tensor
from ._library import hand_over, has_override, is_overridden, transformed, watched
from ._op import Op, direct, keep, kept
from .rotary_config import RotaryCall, as_heads, prepare
from .rotary_kernels import BACKENDS, formula, rotary_, rotary_fwd

# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

# --- autograd ------------------------------------------------------------------------------------


def _keep(call: RotaryCall, outputs: Any, wanted: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if wanted[2] or wanted[3]:
        raise ValueError(
            "apply_rotary: got cos or sin that requires a gradient, expected tables without one: "
            "pass .detach(), or fusedattn.reference.functional.apply_rotary's formula"
        )
    return call[2:6], (call.config._replace(inverse=not call.config.inverse),)


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> tuple[Any, ...]:
    chosen = [dout if want else None for dout, want in zip(douts, wanted, strict=False)]
    given = [dout for dout in chosen if dout is not None]
    if not given:
        return (None,) * 6
    turned = iter(run(RotaryCall(*given, *(None,) * (2 - len(given)), *saved, *rest)))
    return *(None if dout is None else next(turned) for dout in chosen), *(None,) * 4


op = Op(
    "apply_rotary", BACKENDS, rotary_fwd, formula, differentiable=range(4), cotangents=2,
    keep=_keep, pull_back=_pull_back,
)  # fmt: skip
op.backward = op  # the rotation by −angle


class _InPlace(Op):
    """The library op that writes into its arguments."""

    def record_whole(self, call: RotaryCall, backend: str) -> Any:
        raise RuntimeError(
            "torch.ops.fusedattn.rotary_ has no gradient: call fusedattn.apply_rotary instead"
        )


_InPlace("apply_rotary", BACKENDS, rotary_, formula)


class RotaryInPlaceFunction(torch.autograd.Function):
    """The same in the memory of one x, which it returns: apply(x, call, backend) -> x.

    x comes first because autograd takes the first argument for the one that is changed where it is
    a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: RotaryCall, backend: str) -> Tensor:
        saved, ctx.rest = _keep(call, None, (False,) * 4)
        keep(ctx, *saved)
        ctx.backend = backend
        rotary_(call._replace(x=as_heads(x)), backend)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        call = RotaryCall(as_heads(dout), None, *kept(ctx), *ctx.rest)
        return op(call, ctx.backend)[0].view(dout.shape), None, None


_InPlaceFunction = direct(RotaryInPlaceFunction)

# --- public functions ----------------------------------------------------------------------------


def _in_heads(call: RotaryCall) -> RotaryCall:
    x, x2 = call[:2]
    return call._replace(x=as_heads(x), x2=None if x2 is None else as_heads(x2))


def _apply(call: RotaryCall, backend: str) -> tuple[Tensor, ...]:
    """In new tensors."""
    xs = call[:2]
    if not (xs[0].dim() == 4 and (xs[1] is None or xs[1].dim() == 4)):
        call = _in_heads(call)
    return tuple(
        out if out.dim() == x.dim() else out.view(x.shape)
        for x, out in zip(xs, op(call, backend), strict=True)
        if x is not None
    )


_SINGLE = "apply_rotary", ("x", "cos", "sin", "positions", "offset")
_PAIR = "apply_rotary_qk", ("q", "k", "cos", "sin", "positions", "offset")


def _apply_in_place(call: RotaryCall, backend: str) -> tuple[Tensor, ...]:
    """In the tensors themselves, with the errors that torch's own in-place operations raise."""
    x, x2 = call[:2]
    xs = (x,) if x2 is None else (x, x2)
    if x is x2:
        raise ValueError("apply_rotary_qk: got one tensor as q and k, expected two with inplace")
    recorded = torch.is_grad_enabled() and any(y.requires_grad for y in xs)
    if recorded and any(y.requires_grad and y.is_leaf for y in xs):
        raise RuntimeError(
            "apply_rotary: a leaf Variable that requires grad is being used in an in-place "
            "operation."
        )
    compiling = _is_compiling()
    copied = transformed() or (recorded and watched())
    if not (compiling or copied):
        name, names = _SINGLE if x2 is None else _PAIR
        check_in_place(name, names, (*xs, *call[2:6]), len(xs))
        copied = any(y.is_neg() for y in xs)
    if copied or any(y.dim() > 4 for y in xs):
        for y, out in zip(xs, _apply(call, backend), strict=True):
            y.copy_(out)
        return xs
    chosen = op.choose(backend, call)
    if recorded:
        # A Function that changes a view may return one tensor only.
        return tuple(_InPlaceFunction.apply(y, call._replace(x2=None), chosen) for y in xs)
    rotary_(_in_heads(call), chosen)
    return xs


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate the pairs of features of x by the angles of their positions.

    Fused, computed in float32 (float64 for float64) whatever the dtypes, and differentiable in x to
    any order. Tensors may have any strides: a (B, S, H, D) tensor is passed as its
    `.transpose(1, 2)`.

    Args:
        x: (…, S, D) of two dimensions or more, float16, bfloat16, float32 or float64.
        cos, sin: (T, R/2), or (B, T, R/2) with B the first dimension of x: a column per pair. R ≤ D
            features are rotated, the others pass unchanged. Any floating dtype; no gradient.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; else (i, i + R/2), as in GPT-NeoX.
        positions: (S,) or (B, S), int32 or int64: the tables' row of each position; 0 to S − 1 by
            default.
        offset: added to the positions; an int, or a tensor of one int32 or int64 on x's device.
        inplace: write into x itself, whatever its strides, and return it. As with torch's own
            in-place operations the version counter moves, and a leaf that requires a gradient
            raises.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        A tensor like x, or x itself.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched. A
            position without a row raises where it is known: with an int offset alone, and for
            tensors on the CPU in eager mode. On a GPU and in compiled code nothing waits for the
            tensors' values: there the features that have no angle become NaN, and no memory
            outside the tables is read.
        RuntimeError: in place, on a leaf that requires a gradient, on an expanded tensor, or where
            x shares memory with another argument. Queries and keys of one projection do not: their
            elements lie between one another.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    if has_override(x, cos, sin, positions, offset) and is_overridden(locals()):
        return hand_over(apply_rotary, locals())
    if inplace is not False:
        inplace = check_flag("apply_rotary", "inplace", inplace)
    checked = prepare("apply_rotary", x, None, cos, sin, interleaved, positions, offset)
    run = _apply_in_place if inplace else _apply
    return run(checked, backend)[0]


def apply_rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`apply_rotary` of queries and keys in one launch: (q, k).

    q and k have one batch size, length, head dim and dtype; the heads may differ. In place on
    tensors that carry a gradient they are two launches.
    """
    if has_override(q, k, cos, sin, positions, offset) and is_overridden(locals()):
        return hand_over(apply_rotary_qk, locals())
    if inplace is not False:
        inplace = check_flag("apply_rotary_qk", "inplace", inplace)
    if k is None:  # is one tensor where the check is shared
        check_tensor("apply_rotary_qk", "k", k)
    checked = prepare("apply_rotary_qk", q, k, cos, sin, interleaved, positions, offset)
    run = _apply_in_place if inplace else _apply
    q, k = run(checked, backend)
    return q, k
