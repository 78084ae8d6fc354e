"""Which backend serves a call: an op's backends in order of preference, and why each refused.

A backend is a name, a check and its kernels. The check returns `None` when the backend takes the
call, else a `Refusal` with the reason and the remedy. `Op.choose` takes the first that accepts;
falling back to the reference warns once per reason, or raises inside `strict()`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


class UnsupportedError(RuntimeError):
    """No backend that was asked for supports the call; the message lists every reason."""


class Refusal(NamedTuple):
    """Why a backend does not take a call, and what the caller can do about it.

    `needs` is what the backend runs on: "gpu", or "tests" that ask for it; "" for what is here.
    """

    reason: str
    remedy: str
    needs: str = ""

    def concerns_this_machine(self) -> bool:
        """Whether the backend could serve here, were the call or the installation another one."""
        return not self.needs or (self.needs == "gpu" and torch.cuda.is_available())


class Backend(NamedTuple):
    """One implementation of an op.

    refuse(call, requested) says whether the backend takes `call`; `requested` is true when the
    caller named it. `kernels` is called once, on first use, so that importing the library does
    not import a compiler.
    """

    name: str
    refuse: Callable[[Any, bool], Refusal | None]
    kernels: Callable[[], Any]


# A module's forward is called by torch's frames, which are as little the user's as our own.
_LIBRARIES = ("fusedattn", "torch")

_strict = threading.local()
_warned: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within this context a fallback to the slow reference raises `UnsupportedError`.

    It holds for the current thread and nests. Second derivatives, forward mode and `torch.func` are
    no fallback: where no kernel has them they are the formula on every backend. What is not checked
    because a GPU would have to be waited for, the offsets of `attention_varlen`, is checked here.
    """
    before = getattr(_strict, "enabled", False)
    _strict.enabled = enabled
    try:
        yield
    finally:
        _strict.enabled = before


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Within this context a fallback is neither told of nor forbidden."""
    before = getattr(_strict, "explaining", False)
    _strict.explaining = True
    try:
        yield
    finally:
        _strict.explaining = before


def is_strict() -> bool:
    """Whether the current thread is within `strict()`."""
    return getattr(_strict, "enabled", False)


class Choice:
    """An op's backends in order of preference; the last one is the reference."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._order = tuple(backends)
        self._kernels: dict[str, Any] = {}

    def kernels(self, backend: str) -> Any:
        """The kernels of a backend, imported on first use."""
        found = self._kernels.get(backend)
        if found is None:
            found = self._kernels[backend] = self.backends[backend].kernels()
        return found

    def choose(self, requested: str, call: Any) -> str:
        """The name of the backend that serves `call`.

        Raises:
            ValueError: `requested` is neither "auto" nor the name of a backend.
            UnsupportedError: the backend asked for refuses, or all do.
        """
        chosen = self._pick(requested, call)
        if requested == "auto" and chosen == self._order[-1].name:
            self._note_fallback(call)
        return chosen

    def nearest(self, preferred: str, call: Any) -> str:
        """`preferred` where it takes `call`, else the first that does; a fallback is not noted."""
        if self.backends[preferred].refuse(call, True) is None:
            return preferred
        return self._pick("auto", call)

    def _pick(self, requested: str, call: Any) -> str:
        if requested != "auto":
            if not isinstance(requested, str) or requested not in self.backends:
                text = isinstance(requested, str)
                got = f"={requested!r}" if text else f" of type {type(requested).__name__}"
                names = ", ".join(repr(name) for name in ("auto", *self.backends))
                raise ValueError(f"{self.name}: got backend{got}, expected one of {names}")
            if self.backends[requested].refuse(call, True) is not None:
                raise UnsupportedError(
                    f"{self.name}: backend {requested!r} does not take this call\n"
                    + self._table(call, requested)
                )
            return requested
        for backend in self._order:
            if backend.refuse(call, False) is None:
                return backend.name
        raise UnsupportedError(f"{self.name}: no backend takes this call\n" + self._table(call))

    def explain(self, requested: str, call: Any) -> str:
        """The backend that would run, and why each other one that could be here would not."""
        try:
            chosen = self._pick(requested, call)
        except UnsupportedError as error:
            return str(error)
        return f"{self.name}: {chosen}\n" + self._table(call, requested, everywhere=False)

    def _refusals(self, call: Any, requested: str = "auto") -> list[tuple[str, Refusal | None]]:
        return [(b.name, b.refuse(call, b.name == requested)) for b in self._order]

    def _table(self, call: Any, requested: str = "auto", everywhere: bool = True) -> str:
        lines = []
        for name, refusal in self._refusals(call, requested):
            if refusal and not (everywhere or refusal.concerns_this_machine()):
                continue
            text = f"{refusal.reason}; {refusal.remedy}" if refusal else "takes it"
            lines.append(f"  {name}: {text}")
        return "\n".join(lines)

    def _note_fallback(self, call: Any) -> None:
        if getattr(_strict, "explaining", False):
            return
        refused = [(name, refusal) for name, refusal in self._refusals(call) if refusal]
        if is_strict():
            raise UnsupportedError(
                f"{self.name}: only the reference takes this call, and strict() forbids it\n"
                + self._table(call)
            )
        key = (self.name, *(refusal.reason for _, refusal in refused))
        # Dynamo cannot trace a warning; an eager call will give it.
        if key not in _warned and not torch.compiler.is_compiling():
            _warned.add(key)
            here = [(name, x) for name, x in refused if x.concerns_this_machine()]
            reasons = "; ".join(f"{name}: {x.reason}" for name, x in here)
            warnings.warn(
                f"fusedattn.{self.name} falls back to the slow reference ({reasons})",
                stacklevel=_stacklevel_of_the_caller(),
            )


def _stacklevel_of_the_caller() -> int:
    """Which frame, counted from the caller of this, is the nearest one that is not a library's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
