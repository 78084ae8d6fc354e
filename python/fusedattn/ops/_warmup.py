"""Tuning, compiling and loading ahead of the first call that counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._backends import HAS_TRITON


def warmup(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Run `function(*args, **options)` once, so that a later call of its kind finds all ready.

    Kernels are timed, where there are several to choose from, compiled and loaded; those of the
    gradient too, where it is recorded of an argument or a module's parameters. Afterwards such
    calls may be captured in a CUDA graph, and serve requests in inference mode, where nothing is
    timed: of these dtypes, head dims and options, with lengths and heads up to the next power of
    two. Gradients that were accumulated and torch's random numbers stay as they are.

    >>> import torch, fusedattn
    >>> for length in (1024, 2048, 4096):
    ...     q = torch.randn(1, 4, length, 64)
    ...     fusedattn.warmup(fusedattn.attention, q, q, q, causal=True)

    Args:
        function: an op, or a module or function that calls some, and changes no argument.

    Raises:
        TypeError: `function` is no function.
        What the call itself raises.
    """
    if not callable(function):
        raise TypeError(
            f"warmup: got function of type {type(function).__name__}, expected an op and its "
            "arguments, as in warmup(fusedattn.attention, q, k, v)"
        )
    given = [*args, *options.values()]
    if isinstance(function, torch.nn.Module):
        given += function.parameters()
    random = torch.random.fork_rng(range(torch.cuda.device_count()))
    with random, _warming():
        found = function(*args, **options)
        outputs = _with_gradient(found if isinstance(found, (tuple, list)) else [found])
        inputs = _with_gradient(given)
        if outputs and inputs:
            cotangents = [torch.ones_like(x) for x in outputs]
            torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


def _with_gradient(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


def _warming() -> contextlib.AbstractContextManager[None]:
    if not (torch.cuda.is_available() and HAS_TRITON):
        return contextlib.nullcontext()
    from ..kernels.tuning import warming

    return warming()
