"""What the modules share: checks of their options, and inputs that are no plain tensors.

These are torch.fx's proxies and nested tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..ops._checks import check_integer


def check_sizes(module: str, **sizes: Any) -> None:
    """Each is an int above 0."""
    for name, size in sizes.items():
        if check_integer(module, name, size) <= 0:
            raise ValueError(f"{module}: got {name}={size}, expected a number above 0")


def check_dtype(module: str, dtype: Any) -> None:
    """dtype is one that parameters can have, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{module}: got dtype={dtype}, expected one of floating point")


def check_input(owner: str, name: str, x: Any, weight: Tensor | None, nested: str = "") -> None:
    """x is a dense tensor where `weight` is and, unless autocast sees to it, of its dtype.

    `nested` says what is expected of a nested one, which x is not; without it no nested one is.
    """
    if not isinstance(x, Tensor):
        raise wrong(owner, TypeError, name, f"of type {type(x).__name__}", "a Tensor")
    if x.is_nested:
        raise wrong(owner, ValueError, name, "that is nested", nested or "a dense tensor")
    if weight is None:
        return
    if x.dtype != weight.dtype and not (x.is_floating_point() and _autocast(x.device)):
        wanted = f"{weight.dtype}, that of the weights"
        raise wrong(owner, TypeError, name, f"of dtype {x.dtype}", wanted)
    if x.device != weight.device or x.layout is not torch.strided:
        wanted = f"a dense tensor on {weight.device}, where the weights are"
        raise wrong(owner, ValueError, name, f"on {x.device}, {x.layout}", wanted)


def check_mask(owner: str, name: str, mask: Any, *shapes: tuple[int, ...]) -> None:
    """mask is one as torch's modules take it, of one of the shapes."""
    got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
    if got != torch.bool and not (isinstance(mask, Tensor) and mask.is_floating_point()):
        wanted = "a bool (True = blocked) or float Tensor"
        raise wrong(owner, TypeError, name, f"of type {got}", wanted)
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise wrong(owner, ValueError, name, f"of shape {tuple(mask.shape)}", wanted)


def _autocast(device: torch.device) -> bool:
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def wrong(owner: str, error: type[Exception], name: str, got: str, expected: str) -> Exception:
    return error(f"{owner}: got {name} {got}, expected {expected}")


def recorded(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of `module` by torch.fx as one node of its graph, as torch's own modules are recorded.

    The node decides by `training` and by shapes when it runs. None, so that the call is traced into
    as those of other modules are, for the root of the trace and where a node would repeat what has
    been traced: around a `forward` of ours lies another, or hooks but those that compute weights.
    """
    around = (
        getattr(module.forward, "__func__", None),
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
    )
    known = ("fusedattn.nn.", "torch.nn.utils.")
    if not all(getattr(each, "__module__", "").startswith(known) for each in around):
        return None
    tracer: Any = next(x.tracer for x in (*args, *kwargs.values()) if isinstance(x, Proxy))
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, args, kwargs) if path else None


def is_nested(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested


def same_sequences(x: Tensor, y: Any) -> bool:
    """Whether y is nested as x is, with the same sizes and, if jagged, the same offsets object."""
    if not is_nested(y) or x.layout is not y.layout:
        return False
    if x.layout is torch.jagged:
        return x.shape == y.shape
    return torch.equal(x._nested_tensor_size(), y._nested_tensor_size())


def rows(x: Tensor, dims: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """All that nested x holds, (…, its last `dims` dimensions), and the way back.

    The way back makes a tensor of that shape a nested one with the layout and the sequences of x.
    None where those dimensions differ between sequences, or a strided x is not contiguous.
    """
    if dims >= x.dim():
        return None
    if x.layout is torch.jagged:
        jagged_dim: int = x._ragged_idx  # type: ignore[attr-defined]
        if jagged_dim >= x.dim() - dims:
            return None
        # The same offsets object: to torch another one means other lengths.
        offsets, lengths = x.offsets(), x.lengths()  # type: ignore[attr-defined]
        return x.values(), lambda y: torch.nested.nested_tensor_from_jagged(
            y, offsets, lengths, jagged_dim
        )
    sizes = x._nested_tensor_size()
    tails = sizes[:, x.dim() - 1 - dims :]
    if not (len(tails) and (tails == tails[0]).all() and tails.all() and x.is_contiguous()):
        return None
    places = (sizes, x._nested_tensor_strides(), x._nested_tensor_storage_offsets())
    values = x.values().view(-1, *tails[0].tolist())
    return values, lambda y: torch._nested_view_from_buffer(y.reshape(-1), *places)
