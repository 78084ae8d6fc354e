"""The rotary embedding's options and the checks on its arguments, made before anything is launched.

Whatever the shape of x, the kernels see (B, H, S, D), tables (T, R/2) or (1 or B, T, R/2) as they
came, and positions (1 or B, S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_flag, check_offset, check_positions, check_tensor
from ._library import plain

_transforms = torch._C._are_functorch_transforms_active


class RotaryConfig(NamedTuple):
    """The options of one call, in the order of the library ops' schemas.

    interleaved: pairs are features (2i, 2i + 1), else (i, i + R/2). inverse: rotate by −angle, as
    the gradient does. offset: added to the row number or to the positions.
    """

    interleaved: bool = False
    inverse: bool = False
    offset: int = 0


class RotaryCall(NamedTuple):
    """One call, of one or two tensors; to a kernel they are (B, H, S, D)."""

    x: Tensor
    x2: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    start: Tensor | None
    config: RotaryConfig


def as_heads(x: Tensor) -> Tensor:
    """(…, S, D) as (B, H, S, D): a view, unless it merges dimensions that do not fit together."""
    rank = x.dim()
    if rank == 4:
        return x
    if rank < 4:
        return x.unsqueeze(-3) if rank == 3 else x[None, None]
    return x.flatten(1, -3)


def validate_input(op: str, name: str, x: Tensor) -> torch.Size:
    """x is a floating-point tensor of two dimensions or more; returns its shape."""
    shape = check_tensor(op, name, x)
    if len(shape) < 2:
        raise ValueError(
            f"{op}: got {name} of shape {tuple(shape)}, expected at least 2 dimensions "
            "(…, length, features)"
        )
    return shape


def validate_inputs(op: str, x: Tensor, x2: Tensor | None) -> torch.Size:
    """x alone, or q and k that turn together; returns the shape of the first."""
    shape = validate_input(op, "x" if x2 is None else "q", x)
    if x2 is not None:
        shape2 = validate_input(op, "k", x2)
        if x2.dtype != x.dtype or x2.device != x.device:
            raise ValueError(
                f"{op}: got q and k of {x.dtype} on {x.device} and {x2.dtype} on {x2.device}, "
                "expected one dtype and device"
            )
        batch, batch2 = (s[0] if len(s) > 2 else 1 for s in (shape, shape2))
        if batch != batch2 or shape[-2:] != shape2[-2:]:
            raise ValueError(
                f"{op}: got q of shape {tuple(shape)} and k of shape {tuple(shape2)}, expected "
                "one batch size, length and head dim"
            )
    return shape


def validate_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> int:
    """Check cos and sin against x; returns their rows."""
    shape, shape_of_sin, of_x = check_tensor(op, "cos", cos), check_tensor(op, "sin", sin), x.shape
    if not (x.is_cpu and cos.is_cpu and sin.is_cpu):
        check_device(op, "cos", cos, "x", x)
        check_device(op, "sin", sin, "x", x)
    if shape != shape_of_sin or cos.dtype != sin.dtype:
        raise ValueError(
            f"{op}: got cos {tuple(shape)} {cos.dtype} and sin {tuple(shape_of_sin)} {sin.dtype}, "
            "expected one shape and one dtype"
        )
    rank, batch = len(shape), of_x[0] if len(of_x) > 2 else 1
    if rank != 2 and (rank != 3 or (shape[0] != 1 and shape[0] != batch)):
        raise ValueError(
            f"{op}: got cos and sin of shape {tuple(shape)}, expected (T, R/2) or "
            f"(B, T, R/2) with B = {batch}"
        )
    (rows, half), features = shape[-2:], of_x[-1]
    if half == 0 or 2 * half > features:
        raise ValueError(
            f"{op}: got a rotary dim of {2 * half} (cos and sin have {half} columns, one per pair) "
            f"for a head dim of {features}, expected 2 to {features}; of tables that repeat the "
            "angles for both halves pass the first half"
        )
    if rows == 0 and of_x[-2] != 0:
        raise ValueError(f"{op}: got empty tables cos and sin, expected a row for each position")
    return rows


def validate_positions(
    op: str, x: Tensor, positions: Tensor | None, offset: int | Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """positions as (1 or B, S), and the offset as a tensor or as a number."""
    if positions is not None:
        batch, length = x.shape[0] if x.dim() > 2 else 1, x.shape[-2]
        shape = check_positions(op, positions, x)
        if len(shape) == 1 and shape[0] == length:
            positions = positions.unsqueeze(0)
        elif len(shape) != 2 or shape[1] != length or shape[0] not in (1, batch):
            raise ValueError(
                f"{op}: got positions of shape {tuple(shape)}, expected ({length},) or "
                f"({batch}, {length})"
            )
    return positions, *check_offset(op, offset, x)


def _validate_range(
    op: str, length: int, rows: int, positions: Tensor | None, start: Tensor | None, offset: int
) -> None:
    """Every position has its row. What lies on a GPU, or is being traced, is not looked at."""
    if positions is None and start is None:
        if offset < 0 or offset + length > rows:
            raise ValueError(
                f"{op}: got positions {offset} to {offset + length - 1}, expected 0 to {rows - 1}, "
                "the rows of cos and sin"
            )
        return
    known = [x for x in (positions, start) if x is not None]
    if _transforms() or not all(x.is_cpu and plain(x) for x in known):
        return
    lowest, highest = 0, length - 1
    if positions is not None:
        low, high = torch.aminmax(positions)
        lowest, highest = int(low), int(high)
    shift = offset if start is None else int(start)
    if lowest + shift < 0 or highest + shift >= rows:
        raise ValueError(
            f"{op}: got positions {lowest + shift} to {highest + shift}, expected 0 to {rows - 1}, "
            "the rows of cos and sin"
        )


def prepare(
    op: str,
    x: Tensor,
    x2: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    positions: Tensor | None,
    offset: int | Tensor,
) -> RotaryCall:
    """Check everything.

    Raises:
        TypeError: not tensors, not floating point, positions not int32 or int64.
        ValueError: shapes, dtypes or devices that do not fit together, or a position without row.
    """
    shape = validate_inputs(op, x, x2)
    rows = validate_tables(op, x, cos, sin)
    positions, start, offset = validate_positions(op, x, positions, offset)
    length = shape[-2]
    if length != 0 and (positions is None or positions.shape[0] != 0):
        _validate_range(op, length, rows, positions, start, offset)
    if interleaved is not False:
        interleaved = check_flag(op, "interleaved", interleaved)
    return RotaryCall(
        x,
        x2,
        cos,
        sin,
        positions,
        start,
        RotaryConfig(interleaved, False, offset),
    )


def check_call(call: RotaryCall) -> RotaryCall:
    """A call from a traced or exported program, checked as the public function checks its own.

    But no position is looked at: one without a row gives NaN.
    """
    name, (x, x2, cos, sin, positions, start, config) = "apply_rotary", call
    validate_inputs(name, x, x2)
    for y in (x, x2):
        if y is not None and y.dim() != 4:
            raise ValueError(f"{name}: got x of shape {tuple(y.shape)}, expected (B, H, S, D)")
    validate_tables(name, x, cos, sin)
    offset = config.offset if start is None else start
    positions, start, _ = validate_positions(name, x, positions, offset)
    return call._replace(positions=positions, start=start)
