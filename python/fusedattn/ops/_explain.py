"""Which backend serves a call of any op, and why each other one that could be here does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ._library import LibraryOp
from ._registry import UnsupportedError, explaining


class _Found(Exception):
    """Carries the explanation out of the call, before anything is launched."""


class _Explaining(TorchDispatchMode):
    """Under a dispatch mode every call goes by its library op: the first one is explained."""

    def __init__(self, requested: str) -> None:
        super().__init__()
        self.requested = requested

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        library = LibraryOp.of(func)
        if library is None:
            return func(*args, **(kwargs or {}))
        raise _Found(library.explain(self.requested, args))


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The backend that `function(*args, **options)` would run, and why not each other one.

    Without a GPU those that need one are left out; ask for one with `backend=` to read of all.

    >>> import torch, fusedattn
    >>> print(fusedattn.explain(fusedattn.softmax, torch.randn(2, 8)).splitlines()[0])
    softmax: cpu

    Args:
        function: an op (`fusedattn.attention`), or a module or function that calls some: then the
            first one is explained, with what else that runs before it.

    Raises:
        TypeError, ValueError: what the call itself raises for arguments that do not fit together.
        ValueError: it calls none of the ops.
    """
    if not callable(function):
        raise TypeError(
            f"explain: got function of type {type(function).__name__}, expected an op and its "
            "arguments, as in explain(fusedattn.attention, q, k, v)"
        )
    try:
        with explaining(), _Explaining(options.get("backend", "auto")):
            function(*args, **options)
    except _Found as found:
        return str(found)
    except UnsupportedError as error:
        return str(error)
    raise ValueError(f"explain: {function} calls no op of fusedattn on a tensor with elements")
