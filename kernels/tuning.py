"""The choice among launch options: the fastest of a list, timed where that may be done.

`triton.autotune` clears a cache of 256 MB before each launch and waits for the whole device, where
another stream may hold a receive that only this process can answer; it times in serving, in capture
and where timing noise must not decide the order of a sum; and its key has to be among the kernel's
arguments.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton

from .common import INTERPRETED

Launch = Callable[[triton.Config], None]

WORTHWHILE = 1 << 31  # operations, a few microseconds of a GPU: with fewer, launching takes longer
TIMED = 7  # launches of a candidate, of which the median counts

_asked = 0  # warmups that run; the backward of one is on threads of autograd's
_timed = 0  # keys whose fastest candidate is known, of all tuners


class Key(NamedTuple):
    """What decides which candidate is fastest."""

    kind: Hashable  # dtype, head dims, options
    sizes: tuple[int, ...]  # lengths and heads in buckets

    def distance(self, other: Key) -> float:
        """How far apart the sizes lie, in doublings."""
        pairs = zip(self.sizes, other.sizes, strict=True)
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


@contextmanager
def warming() -> Iterator[None]:
    """Within it everything is timed that was not yet: `fusedattn.warmup`."""
    global _asked
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1


def is_warming() -> bool:
    return _asked > 0


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def settings() -> Hashable:
    """What `Tuner.pick` looks at besides its arguments."""
    return (
        _timed,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        is_capturing(),
    )


class Tuner:
    """Picks a kernel's launch options: the fastest candidate, timed once per key.

    The first candidate is the best guess. It is taken untimed under the interpreter, where a call
    is to be deterministic (the order of a sum would hang on timing noise), and for work that is
    not worth it. While a CUDA graph is captured and in inference mode nothing is timed either: what
    was fastest for the nearest sizes serves, else the first. `warming` times all but the
    deterministic.
    """

    def __init__(self) -> None:
        self._fastest: dict[Key, triton.Config] = {}

    def pick(
        self,
        key: Key,
        candidates: Sequence[triton.Config],
        launch: Launch,
        *,
        work: int,
        deterministic: bool,
    ) -> triton.Config:
        """The candidate to launch for `key`; `launch` may run often, so it must not accumulate.

        work: operations of a launch.
        """
        if (
            len(candidates) == 1
            or INTERPRETED.value
            or deterministic
            or torch.are_deterministic_algorithms_enabled()
        ):
            return candidates[0]
        found = self._fastest.get(key)
        if found is not None:
            return found
        if is_capturing() or (_asked == 0 and torch.is_inference_mode_enabled()):
            return self._nearest(key, candidates)
        if _asked == 0 and work < WORTHWHILE:
            return candidates[0]
        found = min(candidates, key=lambda config: _milliseconds(launch, config))
        self._fastest[key] = found
        global _timed
        _timed += 1
        return found

    def _nearest(self, key: Key, candidates: Sequence[triton.Config]) -> triton.Config:
        alike = [each for each in list(self._fastest) if each.kind == key.kind]
        if not alike:
            return candidates[0]
        return self._fastest[min(alike, key=key.distance)]


def _milliseconds(launch: Launch, config: triton.Config) -> float:
    """Of one launch, on the current stream alone; infinity where it fails, for whatever reason.

    Where all fail, the launch itself tells why.
    """
    try:
        launch(config)  # compiles and loads
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
        marks[0].record()
        for mark in marks[1:]:
            launch(config)
            mark.record()
        marks[-1].synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    except Exception:
        return math.inf
