"""The checks that the ops share: an error names the op, the argument, what was got and expected.

They run before anything is launched, and on the tensors of traced and exported calls as well.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the usual one first
HALVES = FLOATS[1:3]
INDICES = (torch.int32, torch.int64)
CAUSAL = {False: 0, True: 2, "top_left": 1, "bottom_right": 2}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_MANY = 1000  # ways in which the elements of two tensors may lie between one another
_strided = torch.strided
_is_tracing = torch._C._is_tracing
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)

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
    # Not torch's `is_lazy`, which dynamo does not trace of a subclass.
    lazy = isinstance(x, torch.nn.parameter.UninitializedTensorMixin)  # type: ignore[attr-defined]
    return isinstance(x, Tensor) and not (lazy or is_causal_bias(x))


def is_causal_bias(x: object) -> bool:
    """torch's CausalBias says which keys are masked; its memory is never written."""
    bias = sys.modules.get("torch.nn.attention.bias")  # importing it would import dynamo
    return bias is not None and isinstance(x, bias.CausalBias)


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


def check_like(
    op: str, name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Check that x, an intermediate result, has this shape, dtype and device."""
    if x.shape != torch.Size(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{op}: got {name} of shape {tuple(x.shape)}, {x.dtype}, on {x.device}, expected "
            f"{tuple(shape)}, {dtype}, on {device}"
        )


def check_broadcast(
    op: str, name: str, x: Tensor, shape: Sequence[int], of: str, hint: Any = None
) -> None:
    """Check that x broadcasts to `shape`, which is that of `of`.

    hint(x.shape, shape): what more there is to say of one that does not.
    """
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
        f"{tuple(shape)}{hint(given, shape) if hint else ''}"
    )


def check_positions(op: str, positions: Tensor, x: Tensor) -> torch.Size:
    """Check positions that belong to x; returns their shape, which the op looks at."""
    shape = check_tensor(op, "positions", positions, INDICES)
    check_device(op, "positions", positions, "x", x)
    return shape


def check_offset(op: str, offset: int | Tensor, x: Tensor) -> tuple[Tensor | None, int]:
    """What is added to the positions: a tensor of one number, or a number that leaves them room."""
    if type(offset) is int and 0 <= offset < 2**62:
        return None, offset
    if not isinstance(offset, Tensor):
        return None, check_integer(op, "offset", offset, "an int or a tensor", bits=62)
    check_tensor(op, "offset", offset, INDICES)
    check_device(op, "offset", offset, "x", x)
    if offset.numel() != 1:
        raise ValueError(f"{op}: got offset of shape {tuple(offset.shape)}, expected one number")
    return offset.reshape(1), 0


# --- options: Python's numbers, and as in torch those of numpy and of tensors without dimensions --


def check_number(op: str, name: str, value: Any, expected: str = "a float") -> float:
    """`value` as a float; what has no value yet, while a graph is traced, stays symbolic."""
    if type(value) not in _NUMBERS:
        value = _scalar(value)
    if type(value) in (float, torch.SymFloat):
        return value
    if type(value) is torch.SymInt:
        return torch.sym_float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: got {name} {_what(value)}, expected {expected}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{op}: got {name} beyond the range of a float, expected {expected}"
        ) from None


def check_probability(op: str, name: str, value: Any) -> float:
    """`value` as a float from 0 to 1."""
    value = check_number(op, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: got {name}={value}, expected 0 <= {name} <= 1")
    return value


def check_integer(op: str, name: str, value: Any, expected: str = "an int", bits: int = 63) -> int:
    """`value` as an int of so many bits and a sign."""
    if type(value) is not int:
        value = _scalar(value)
        if type(value) is torch.SymInt:
            return value  # type: ignore[return-value]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: got {name} {_what(value)}, expected {expected}")
    if not -(1 << bits) <= value < 1 << bits:
        raise ValueError(
            f"{op}: got {name} of {value.bit_length()} bits, expected at most {bits} and a sign"
        )
    return value


def check_flag(op: str, name: str, value: Any) -> bool:
    """`value` as a bool, which 0 and 1 are not."""
    if value is True or value is False:
        return value
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(f"{op}: got {name} {_what(value)}, expected a bool")
    return value


def check_causal(op: str, causal: Any) -> int:
    """The number by which the kernels know `causal`."""
    if not isinstance(causal, (bool, str)):
        causal = _scalar(causal)
    expected = "expected False, True, 'top_left' or 'bottom_right'"
    if not isinstance(causal, (bool, str)):
        raise TypeError(f"{op}: got causal {_what(causal)}, {expected}")
    if causal not in CAUSAL:
        raise ValueError(f"{op}: got causal={causal!r}, {expected}")
    return CAUSAL[causal]


def check_seed(op: str, seed: Any, x: Tensor) -> int | Tensor:
    """An integer of 64 bits, or a tensor with one and a value."""
    if not isinstance(seed, Tensor):
        return check_integer(op, "seed", seed, "an int or a tensor")
    shape = check_tensor(op, "seed", seed, INDICES)
    if shape.numel() != 1:
        raise ValueError(f"{op}: got seed of shape {tuple(shape)}, expected 1 element")
    if seed.is_meta and not x.is_meta:
        raise ValueError(f"{op}: got seed on meta, expected one with a value")
    return seed


def seed_tensor(name: str, seed: int | Tensor | None, x: Tensor) -> Tensor:
    """The seed of a dropout as one int64 where x is; None draws it from torch's generator.

    Raises:
        TypeError, ValueError: neither an integer of 64 bits nor a tensor with one.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    seed = check_seed(name, seed, x)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).to(x.device, torch.int64)
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _scalar(value: Any) -> Any:
    """numpy's scalars and tensors without dimensions as Python's; anything else as it is."""
    try:
        if value.ndim == 0 and not getattr(value, "requires_grad", False):
            return value.item()
    except (AttributeError, RuntimeError, ValueError):  # a number, or without a value
        pass
    return value


def _what(value: Any) -> str:
    if isinstance(value, Tensor) and value.requires_grad:
        return "that requires a gradient"
    return f"of type {type(value).__name__}"


# --- memory that is written in place -------------------------------------------------------------


def check_in_place(
    op: str, names: Sequence[str], tensors: Sequence[Tensor | None], written: int
) -> None:
    """Check that the first `written` tensors may be written to, each element in its own memory.

    Tensors whose elements lie between one another, as queries and keys of one projection do, pass.

    Raises:
        RuntimeError: as torch's own in-place operations.
    """
    if _is_tracing():  # by torch.jit: sizes are tensors
        return
    storages: list[Any] = []
    for i, x in enumerate(tensors):
        if x is None:
            continue
        if i < written and x.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{op}: inplace update to {names[i]}, an inference tensor, outside InferenceMode "
                "is not allowed; clone() it first"
            )
        storage = x.untyped_storage()
        try:
            for j, other in enumerate(storages):
                if other is storage and _overlap(*_layout(tensors[j], x)):
                    raise RuntimeError(
                        f"{op}: unsupported operation: some elements of {names[j]}, which is "
                        f"written to, and {names[i]} refer to a single memory location; clone() "
                        f"{names[j]} first"
                    )
            if i < written:
                storages.append(storage)
                if _overlaps_itself(x.shape, x.stride()):
                    raise RuntimeError(
                        f"{op}: unsupported operation: more than one element of {names[i]}, of "
                        f"shape {tuple(x.shape)} and strides {x.stride()}, refers to a single "
                        "memory location, and it is written to; clone() it first"
                    )
        except TypeError:  # symbolic sizes have no hash
            return


@functools.lru_cache(maxsize=256)
def _overlaps_itself(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether two elements of one tensor lie at one place."""
    if shape.numel() == 0:
        return False
    last = reach = 0
    apart = True
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride == last:
                return True
            apart = apart and stride > reach
            last, reach = stride, reach + stride * (size - 1)
    return not apart and _meet(0, _steps(1, 1, shape, strides, shape, strides), moved=False)


def _layout(x: Any, y: Tensor) -> tuple[Any, ...]:
    """All that the overlap of two tensors in one storage depends on, sizes in bytes."""
    size, size_y = x.element_size(), y.element_size()
    distance = y.storage_offset() * size_y - x.storage_offset() * size
    return distance, size, size_y, x.shape, x.stride(), y.shape, y.stride()


@functools.lru_cache(maxsize=256)
def _overlap(
    distance: int, size: int, size_y: int,
    shape: torch.Size, strides: Sequence[int], shape_y: torch.Size, strides_y: Sequence[int],
) -> bool:  # fmt: skip
    """Whether two tensors in one storage have a byte in common."""
    if shape.numel() == 0 or shape_y.numel() == 0:
        return False
    return _meet(distance, _steps(size, size_y, shape, strides, shape_y, strides_y), moved=True)


def _steps(
    size: int, size_y: int,
    shape: Sequence[int], strides: Sequence[int], shape_y: Sequence[int], strides_y: Sequence[int],
) -> dict[int, tuple[int, int]]:  # fmt: skip
    """How often each stride, in bytes, may be taken from a byte of one to one of the other."""
    steps = {1: (1 - size_y, size - 1)}
    of_x = [(n, stride * size, 0) for n, stride in zip(shape, strides, strict=True)]
    of_y = [(n, stride * size_y, 1) for n, stride in zip(shape_y, strides_y, strict=True)]
    for n, step, back in of_x + of_y:
        low, high = steps.get(step, (0, 0))
        steps[step] = (low - n + 1, high) if back else (low, high + n - 1)
    steps.pop(0, None)
    return steps


def _meet(distance: int, steps: dict[int, tuple[int, int]], moved: bool) -> bool:
    """Whether steps lead over the distance, one of them at least unless `moved`; if in doubt, yes.

    The longest are taken first: those that follow must be able to cover what is left.
    """
    left = {(distance, moved)}
    order = sorted(steps.items(), reverse=True)
    for i, (step, (low, high)) in enumerate(order):
        shortest, longest = (sum(s * ends[e] for s, ends in order[i + 1 :]) for e in (0, 1))
        found = set()
        for rest, moving in left:
            least = max(low, -((longest - rest) // step))
            most = min(high, (rest - shortest) // step)
            if most - least > _MANY:
                return True
            found |= {(rest - step * n, moving or n != 0) for n in range(least, most + 1)}
        if len(found) > _MANY:
            return True
        left = found
    return (0, True) in left
