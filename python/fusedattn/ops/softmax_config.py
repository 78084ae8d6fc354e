"""Softmax's options and the checks on its arguments, made once before anything is launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_broadcast,
    check_causal,
    check_device,
    check_integer,
    check_like,
    check_number,
    check_tensor,
)

_is_compiling = torch.compiler.is_compiling


class SoftmaxConfig(NamedTuple):
    """The options of one call. causal: 0 none, 1 top-left, 2 bottom-right."""

    causal: int
    scale: float

    @property
    def causal_name(self) -> bool | str:
        """The public spelling of `causal`."""
        return (False, "top_left", "bottom_right")[self.causal]


class SoftmaxCall(NamedTuple):
    """One call, along dimension `dim`."""

    x: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dim: int
    config: SoftmaxConfig


class SoftmaxBackwardCall(NamedTuple):
    """The gradient of out, with out.

    x_grad, bias_grad: those of x and of the bias are wanted.
    """

    dout: Tensor
    out: Tensor
    dim: int
    x_grad: bool
    bias_grad: bool
    config: SoftmaxConfig


def configure(rank: int, dim: int, causal: bool | str, scale: float) -> SoftmaxConfig:
    """Check the options of a call on a tensor of `rank` dimensions; dim is an int already."""
    if not -max(rank, 1) <= dim < max(rank, 1):
        dim = check_integer("softmax", "dim", dim)  # 10**5000 has no text
        raise ValueError(
            f"softmax: got dim={dim}, expected {-max(rank, 1)} <= dim < {max(rank, 1)} for a "
            f"tensor of {rank} dimensions"
        )
    number = check_causal("softmax", causal)
    if number and (rank < 2 or dim not in (-1, rank - 1)):
        raise ValueError(
            f"softmax: got causal={causal!r} with dim={dim} of {rank} dimensions, expected dim=-1 "
            "of at least 2 dimensions (…, query, key)"
        )
    return SoftmaxConfig(number, check_number("softmax", "scale", scale))


_remembered = functools.lru_cache(maxsize=256)(configure)


def remembered(rank: int, dim: int, causal: bool | str, scale: float) -> SoftmaxConfig:
    """The same, looked up where equal options are the same: 1 == True == np.float32(1)."""
    usual = type(scale) is float and (type(causal) is bool or type(causal) is str)
    return (_remembered if usual else configure)(rank, dim, causal, scale)


def check_extras(x: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    """Check mask and bias against x."""
    if mask is not None:
        remark = " (True = keep); a float mask is passed as bias"
        check_tensor("softmax", "mask", mask, (torch.bool,), remark)
        _check_fit("mask", mask, x)
    if bias is not None:
        allowed = FLOATS[3:] if x.dtype == torch.float64 else FLOATS[:3]
        check_tensor("softmax", "bias", bias, allowed)
        _check_fit("bias", bias, x)


def _check_fit(name: str, extra: Tensor, x: Tensor) -> None:
    check_device("softmax", name, extra, "x", x)
    check_broadcast("softmax", name, extra, x.shape, "the shape of x,")


def prepare(
    x: Tensor, dim: int, mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool | str
) -> SoftmaxCall:
    """Check everything."""
    shape = check_tensor("softmax", "x", x)
    # Dynamo traces through a cached function, but warns about it.
    checked = configure if _is_compiling() else remembered
    dim = dim if type(dim) is int else check_integer("softmax", "dim", dim)
    config = checked(len(shape), dim, causal, scale)
    if mask is not None or bias is not None:
        check_extras(x, mask, bias)
    return SoftmaxCall(x, mask, bias, dim, config)


def check_call(call: SoftmaxCall) -> SoftmaxCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    x, mask, bias, dim, config = call
    if config.causal not in (0, 1, 2):
        raise ValueError(f"softmax: got causal={config.causal}, expected 0, 1 or 2")
    return prepare(x, dim, mask, bias, config.scale, config.causal_name)


def check_backward_call(call: SoftmaxBackwardCall) -> SoftmaxBackwardCall:
    """The same for a call of the backward."""
    out = call.out
    check_like("softmax_bwd", "dout", call.dout, out.shape, out.dtype, out.device)
    checked = check_call(SoftmaxCall(out, None, None, call.dim, call.config))
    return call._replace(config=checked.config)
