"""The checks that the ops share: an error names the op, the argument, what was got and expected.

They run before anything is launched, and on the tensors of traced and exported calls as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the usual one first
HALVES = FLOATS[1:3]
INDICES = (torch.int32, torch.int64)
CAUSAL = {False: 0, True: 2, "top_left": 1, "bottom_right": 2}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_strided = torch.strided

# --- tensors -------------------------------------------------------------------------------------


def check_tensor(
    op: str, name: str, x: Tensor, dtypes: Sequence[torch.dtype] = FLOATS, remark: str = ""
) -> torch.Size:
    """Check that x is a dense tensor of one of `dtypes`; returns its shape.

    Raises:
        TypeError: it is not, and `remark` may say more about what is expected.
    """
    try:
        if (
            (type(x) in _PLAIN_TYPES or _has_values(x))
            and x.dtype in dtypes
            and x.layout is _strided
        ):
            return x.shape
    except RuntimeError:  # a nested tensor has no shape
        pass
    raise TypeError(f"{op}: got {name} {_kind(x)}, expected a dense {_or(dtypes)} tensor{remark}")


def _has_values(x: object) -> bool:
    return isinstance(x, Tensor) and not torch.nn.parameter.is_lazy(x)


def _kind(x: object) -> str:
    """What x is, if it is not a tensor that a kernel can read."""
    if not isinstance(x, Tensor) or not _has_values(x):
        return f"of type {type(x).__name__}"
    if x.is_nested:
        return "that is nested"
    return f"of layout {x.layout}" if x.layout is not _strided else f"of dtype {x.dtype}"


def _or(dtypes: Sequence[torch.dtype]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def check_device(op: str, name: str, x: Tensor, of: str, like: Tensor) -> None:
    """Check that x is where `like`, the argument `of`, is."""
    if not (x.is_cpu and like.is_cpu) and x.device != like.device:  # comparing takes longer
        raise ValueError(
            f"{op}: got {name} on {x.device}, expected the device of {of}, {like.device}"
        )


def check_broadcast(op: str, name: str, x: Tensor, shape: Sequence[int], of: str) -> None:
    """Check that x broadcasts to `shape`, which is that of `of`."""
    given = x.shape
    missing = len(shape) - len(given)
    if missing >= 0:
        for have, want in zip(given, shape[missing:], strict=True):
            if have != want and have != 1:
                break
        else:
            return
    raise ValueError(
        f"{op}: got {name} of shape {tuple(given)}, expected one that broadcasts to {of} "
        f"{tuple(shape)}"
    )


def check_positions(op: str, positions: Tensor, x: Tensor) -> torch.Size:
    """Check positions that belong to x; returns their shape, which the op looks at."""
    shape = check_tensor(op, "positions", positions, INDICES)
    check_device(op, "positions", positions, "x", x)
    return shape


def check_offset(op: str, offset: int | Tensor, x: Tensor) -> tuple[Tensor | None, int]:
    """What is added to the positions: a tensor of one number, or a number."""
    if type(offset) is int:
        return None, offset
    if not isinstance(offset, Tensor):
        if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
            raise TypeError(
                f"{op}: got offset of type {type(offset).__name__}, expected an int or a tensor"
            )
        return None, offset
    check_tensor(op, "offset", offset, INDICES)
    check_device(op, "offset", offset, "x", x)
    if offset.numel() != 1:
        raise ValueError(f"{op}: got offset of shape {tuple(offset.shape)}, expected one number")
    return offset.reshape(1), 0


# --- options -------------------------------------------------------------------------------------


def check_number(op: str, name: str, value: float) -> float:
    """`value` as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: got {name} of type {type(value).__name__}, expected a float")
    return float(value)


def check_probability(op: str, name: str, value: float) -> float:
    """`value` as a float from 0 to 1."""
    value = check_number(op, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: got {name}={value}, expected 0 <= {name} <= 1")
    return value


def check_causal(op: str, causal: bool | str) -> int:
    """The number by which the kernels know `causal`."""
    if causal not in CAUSAL:
        raise ValueError(
            f"{op}: got causal={causal!r}, expected False, True, 'top_left' or 'bottom_right'"
        )
    return CAUSAL[causal]
