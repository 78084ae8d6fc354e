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
from ._library import direct, transformed
from .rotary_config import RotaryConfig, prepare
from .rotary_library import call, call_in_place, formula, op

# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

# --- autograd ------------------------------------------------------------------------------------


class RotaryFunction(torch.autograd.Function):
    """Differentiable rotation on arguments that `fusedattn.apply_rotary` has already checked.

    apply(cos, sin, positions, start, config, backend, *xs) -> a tuple of one or two tensors:
    tables (T, R/2) or (1 or B, T, R/2), positions (1 or B, S) or None, start a tensor of one offset
    or None, config a `RotaryConfig`, backend a backend's name. Gradients flow to `xs` alone.
    """

    @staticmethod
    def forward(ctx: Any, cos, sin, positions, start, config, backend, *xs):
        ctx.save_for_backward(cos, sin, positions, start)
        ctx.set_materialize_grads(False)
        ctx.config, ctx.backend = config, backend
        return call(xs, cos, sin, positions, start, config, backend)

    @staticmethod
    def backward(ctx: Any, *douts):
        wanted = [
            dout is not None and needed
            for dout, needed in zip(douts, ctx.needs_input_grad[6:], strict=True)
        ]
        grads = tuple(dout for dout, want in zip(douts, wanted, strict=True) if want)
        if grads:
            cos, sin, positions, start = ctx.saved_tensors
            options = (
                cos,
                sin,
                positions,
                start,
                RotaryConfig(ctx.config.interleaved, not ctx.config.inverse, ctx.config.offset),
                ctx.backend,
            )
            if torch.is_grad_enabled() and not _is_compiling():
                grads = RotaryFunction.apply(*options, *grads)
            else:
                grads = call(grads, *options)
        turned = iter(grads)
        return (None,) * 6 + tuple(next(turned) if want else None for want in wanted)


class RotaryInPlaceFunction(torch.autograd.Function):
    """The same in the memory of one x, which it returns: apply(x, cos, …, backend) -> x.

    x comes first because autograd takes the first argument for the one that is changed where it is
    a view.
    """

    @staticmethod
    def forward(ctx: Any, x, cos, sin, positions, start, config, backend):
        ctx.save_for_backward(cos, sin, positions, start)
        ctx.config, ctx.backend = config, backend
        call_in_place(x, None, cos, sin, positions, start, config, backend)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout):
        cos, sin, positions, start = ctx.saved_tensors
        config = ctx.config._replace(inverse=not ctx.config.inverse)
        options = cos, sin, positions, start, config, ctx.backend
        if torch.is_grad_enabled():
            (grad,) = RotaryFunction.apply(*options, dout)
        else:
            (grad,) = call((dout,), *options)
        return grad, None, None, None, None, None, None


_Function, _InPlaceFunction = direct(RotaryFunction), direct(RotaryInPlaceFunction)

# --- public functions ----------------------------------------------------------------------------


def _apply(x, x2, cos, sin, positions, start, config, backend) -> tuple[Tensor, ...]:
    """In new tensors."""
    xs = (x,) if x2 is None else (x, x2)
    if transformed():
        return tuple(formula(y, cos, sin, positions, start, config) for y in xs)
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            raise ValueError(
                "apply_rotary: got cos or sin that requires a gradient, expected tables without "
                "one: pass .detach(), or fusedattn.reference.functional.apply_rotary's formula"
            )
        if x.requires_grad or (x2 is not None and x2.requires_grad):
            # One tensor passed twice would break the graph under torch.compile.
            xs = (x, x.view_as(x)) if x2 is x else xs
            return _Function.apply(cos, sin, positions, start, config, backend, *xs)
    return call(xs, cos, sin, positions, start, config, backend)


_SINGLE = "apply_rotary", ("x", "cos", "sin", "positions", "offset")
_PAIR = "apply_rotary_qk", ("q", "k", "cos", "sin", "positions", "offset")


def _apply_in_place(x, x2, cos, sin, positions, start, config, backend) -> tuple[Tensor, ...]:
    """In the tensors themselves, with the errors that torch's own in-place operations raise."""
    xs = (x,) if x2 is None else (x, x2)
    if x is x2:
        raise ValueError("apply_rotary_qk: got one tensor as q and k, expected two with inplace")
    recorded = _grad_enabled() and (x.requires_grad or (x2 is not None and x2.requires_grad))
    if recorded and any(y.requires_grad and y.is_leaf for y in xs):
        raise RuntimeError(
            "apply_rotary: a leaf Variable that requires grad is being used in an in-place "
            "operation."
        )
    compiling = _is_compiling()
    copied = transformed() or (compiling and recorded)
    if not (compiling or copied):
        op, names = _SINGLE if x2 is None else _PAIR
        check_in_place(op, names, (*xs, cos, sin, positions, start), len(xs))
        copied = x.is_neg() or (x2 is not None and x2.is_neg())
    if copied or x.dim() > 4 or (x2 is not None and x2.dim() > 4):
        for y, out in zip(
            xs, _apply(x, x2, cos, sin, positions, start, config, backend), strict=True
        ):
            y.copy_(out)
    elif recorded:
        # A Function that changes a view may return one tensor only.
        arguments = (cos, sin, positions, start, config, backend)
        return tuple(_InPlaceFunction.apply(y, *arguments) for y in xs)
    else:
        call_in_place(x, x2, cos, sin, positions, start, config, backend)
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
    if inplace is not False:
        inplace = check_flag("apply_rotary", "inplace", inplace)
    checked = prepare("apply_rotary", x, None, cos, sin, interleaved, positions, offset)
    run = _apply_in_place if inplace else _apply
    return run(*checked, op.choose(backend, checked))[0]


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
    if inplace is not False:
        inplace = check_flag("apply_rotary_qk", "inplace", inplace)
    if k is None:  # is one tensor where the check is shared
        check_tensor("apply_rotary_qk", "k", k)
    checked = prepare("apply_rotary_qk", q, k, cos, sin, interleaved, positions, offset)
    run = _apply_in_place if inplace else _apply
    q, k = run(*checked, op.choose(backend, checked))
    return q, k
