"""How a version is timed and how much memory it takes; what the machine can do at best.

A `Version` is a function of a turn number: `call(i)` runs on input set `i % sets` and returns the
output tensors. Consecutive calls get different random inputs, and the error is measured on the
output of the last timed call, so a version that hands back a stored result shows at once.

Versions take turns in one process, in a new random order every round: who follows whom decides what
is in the caches. A turn is one untimed call, which refills the caches that the previous version
emptied, then enough timed calls to fill a few milliseconds. On a CPU, a turn for which the system
had to hand out memory is taken again. The samples of a version are its turns' means (on a GPU:
every call, between two events, with L2 flushed before).
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from .versions import DTYPES, Call, Outputs, Version

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

MAX_ROUNDS = 30
TURN_SECONDS = 10e-3
SETTLE_SECONDS = 20e-3
SHORT_TURN_SECONDS = 50e-3
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
MOST_TRIES = 6
MANY_PAGES = 256
FIRST_SECONDS = 2.0  # up to here a first call tells nothing of the calls after it
FEWEST_TURNS = 5


# --- statistics ----------------------------------------------------------------------------------


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the samples lie, linear between neighbours.

    Raises:
        ValueError: there are no samples, or `fraction` is not in [0, 1].
    """
    if not samples or not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"percentile: got {len(samples)} samples and fraction={fraction}, "
            "expected at least one and a fraction in [0, 1]"
        )
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the 20th and 80th percentile of `samples` turns."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        median, p20, p80 = (percentile(samples, f) for f in (0.5, 0.2, 0.8))
        return cls(median, p20, p80, len(samples))


# --- time ----------------------------------------------------------------------------------------


class CpuClock:
    """Wall time of whole turns.

    Freed memory stays with the process (glibc): for each page that it gets back from the system,
    the system takes longer than a kernel takes to fill it.
    """

    def __init__(self) -> None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
                mallopt(option, value)

    def turn(self, call: Call, first: int, count: int) -> tuple[list[float], Outputs]:
        """The mean seconds of `count` calls on input sets from `first`, and the last output."""
        output: Outputs = ()
        start = time.perf_counter()
        for i in range(first, first + count):
            del output
            output = call(i)
        return [(time.perf_counter() - start) / count], output

    def wait(self) -> None:
        """Return when all work is done; on a CPU it already is."""


class CudaClock:
    """Time between two events around each call, with L2 overwritten in between."""

    def __init__(self, device: torch.device) -> None:
        level2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(4 * level2, dtype=torch.uint8, device=device)

    def turn(self, call: Call, first: int, count: int) -> tuple[list[float], Outputs]:
        """The seconds of each of `count` calls on input sets from `first`, and the last output."""
        output: Outputs = ()
        pairs = []
        for i in range(first, first + count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            del output
            self._scratch.zero_()
            start.record()
            output = call(i)
            end.record()
            pairs.append((start, end))
        self.wait()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs], output

    def wait(self) -> None:
        """Return when all work on the GPU is done."""
        torch.cuda.synchronize()


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def schedule(turns: Mapping[str, int]) -> list[str]:
    """The order of all turns: each version's turns are spread evenly over the rounds.

    The most frequent version has a turn in every round. Every round has a random order, the same
    in every run, so that nobody always follows the same neighbour.
    """
    rounds = max(turns.values(), default=0)
    shuffle = random.Random(0).shuffle
    order = []
    for r in range(rounds):
        names = [n for n, share in turns.items() if (r + 1) * share // rounds > r * share // rounds]
        shuffle(names)
        order += names
    return order


@dataclass
class Measured:
    """What timing one version gave; `output` is that of the last call, on set `set_index`."""

    timing: Timing
    peak_bytes: int | None
    output: Outputs
    set_index: int


@dataclass
class Contestant:
    """A version on its way through `measure`."""

    version: Version
    calls: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    output: Outputs = ()
    samples: list[float] = field(default_factory=list)

    def run(self, clock: CpuClock | CudaClock) -> float:
        """One call on the next input set, timed by itself; returns its seconds."""
        self.output = ()
        start = time.perf_counter()
        self.output = self.version.call(self.calls)
        clock.wait()
        self.calls += 1
        return time.perf_counter() - start

    def warm_up(self, clock: CpuClock | CudaClock, device: torch.device, share: float) -> None:
        """The first call builds what is built lazily, the second measures memory, two more time.

        An engine with an arena of its own keeps it, so its memory shows in the first call only.
        What measures memory returns free memory to the system before, so that such a call takes
        longer. A version whose calls outlast its share of the time has the shortest as a sample,
        and those after it are left out: all but the first where that is very long, the third where
        two were far too long and it was not the system's pages that took so long. One call tells
        nothing: a shared machine can stand still for half a second.
        """
        probe, pages, far_too_long = PeakMemory(device), _fresh_pages(), 3 * share
        with probe:
            first = self.seconds = self.run(clock)
        self.peak_bytes = probe.peak_bytes
        fresh = _fresh_pages() - pages >= MANY_PAGES
        if first < max(far_too_long, FIRST_SECONDS):
            self.output = ()
            with probe:
                self.seconds = self.run(clock)
            self.peak_bytes = self.peak_bytes if self.version.owns_arena else probe.peak_bytes
            if min(first, self.seconds) < far_too_long or fresh:
                third = on_kept_pages(clock, lambda: self.run(clock))
                self.seconds = min(self.seconds, third)
        if self.seconds < share:
            self.seconds = min(self.seconds, self.run(clock))
        else:
            self.samples.append(self.seconds)

    @property
    def calls_per_turn(self) -> int:
        return max(1, math.ceil(TURN_SECONDS / max(self.seconds, 1e-7)))

    def turn(self, clock: CpuClock | CudaClock) -> None:
        """One turn."""
        if self.seconds < SETTLE_SECONDS:
            self.run(clock)
        self.samples += on_kept_pages(clock, lambda: self.calls_of_turn(clock))

    def calls_of_turn(self, clock: CpuClock | CudaClock) -> list[float]:
        """The seconds of one try at a turn."""
        self.output = ()
        count = self.calls_per_turn
        samples, self.output = clock.turn(self.version.call, self.calls, count)
        self.calls += count
        self.seconds = min(self.seconds, *samples)
        return samples

    def leave_first_inputs(self, clock: CpuClock | CudaClock, sets: int) -> None:
        """End on other inputs than the first call's, whose stored result would look right."""
        if self.calls > 1 and (self.calls - 1) % sets == 0:
            with self.version.context():
                self.run(clock)

    def turns_within(self, share: float) -> int:
        """How many turns fit; a version with short turns gets a few even where time is out."""
        settle = self.seconds < SETTLE_SECONDS
        cost = self.seconds * (self.calls_per_turn + settle)
        fewest = FEWEST_TURNS if cost < SHORT_TURN_SECONDS else 0 if self.samples else 1
        return max(fewest, min(MAX_ROUNDS, int(share / cost)))


def measure(
    versions: Mapping[str, Version],
    *,
    device: torch.device,
    budget: float,
    sets: int = 2,
    failed: dict[str, str] | None = None,
) -> dict[str, Measured]:
    """Time the versions of one case side by side, in about `budget` seconds.

    Args:
        versions: what to time, by name.
        device: where they run.
        budget: seconds for all of them together; a version slower than its share is called once.
        sets: how many input sets the calls rotate through.
        failed: receives name → reason for a version that raises; without it the error propagates.
    """
    gc.collect()
    clock = clock_for(device)
    share = budget / max(1, len(versions))
    contestants: dict[str, Contestant] = {}
    for name, version in versions.items():
        contestant = Contestant(version)
        try:
            with version.context():
                contestant.warm_up(clock, device, share)
        except RuntimeError as error:
            if failed is None:
                raise
            failed[name] = _first_line(error)
            continue
        contestants[name] = contestant
    for name in schedule({n: c.turns_within(share) for n, c in contestants.items()}):
        with versions[name].context():
            contestants[name].turn(clock)
    for contestant in contestants.values():
        contestant.leave_first_inputs(clock, sets)
    return {
        name: Measured(
            Timing.of(contestant.samples),
            contestant.peak_bytes,
            tuple(x.detach() for x in contestant.output),
            (contestant.calls - 1) % sets,
        )
        for name, contestant in contestants.items()
    }


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


# --- memory --------------------------------------------------------------------------------------


def on_kept_pages(clock: CpuClock | CudaClock, work: Callable[[], T]) -> T:
    """What `work` returns; on a CPU again where the memory allocator had to grow.

    Before that it gets twice as much again: glibc seldom finds room for an aligned block where one
    of the same size has been.
    """
    for _ in range(MOST_TRIES):
        before = _fresh_pages()
        result = work()
        grown = _fresh_pages() - before
        if grown < MANY_PAGES or not isinstance(clock, CpuClock):
            break
        torch.empty(2 * grown * mmap.PAGESIZE, dtype=torch.uint8).fill_(0)
    return result


def _fresh_pages() -> int:
    """How many pages this process has got from the system so far; 0 where nobody counts."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class PeakMemory:
    """How far memory rose inside the `with` block above what was in use before it.

    GPU: torch's allocator. Linux: the kernel's own high-water mark of resident memory, reset on
    entry after free heap has been returned, so that nothing between two samples escapes.
    Elsewhere `peak_bytes` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None
        self._before = 0
        self._reset = False

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            _trim_heap()
            self._reset = _reset_high_water()
            self._before = _resident("VmRSS") if self._reset else 0
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._reset:
            self.peak_bytes = max(0, _resident("VmHWM") - self._before)


def _reset_high_water() -> bool:
    """Forget the process's peak of resident memory; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


# --- the machine's limits ------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What this machine reaches at best (the 20th percentile of the times), in this run.

    In a dtype that it multiplies more slowly than fp32, that is fp32's rate: one can convert.
    """

    flops_per_second: dict[str, float]
    bytes_per_second: float


def measure_limits(device: torch.device, budget: float, scale: float = 1.0) -> Limits:
    """A large square matmul per dtype, and a large copy (bytes read + written).

    `scale` shrinks both, for tests. A matmul too slow for its share of the time is made smaller.
    """
    size, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    size, copied = max(16, int(size * scale)), max(1024, int(copied * scale))
    share = budget / (len(DTYPES) + 1)
    flops = {name: _matmul_rate(dtype, size, device, share) for name, dtype in DTYPES.items()}
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Version(lambda i: (target.copy_(source),))
    timing = measure({"copy": copy}, device=device, budget=share)["copy"].timing
    return Limits(
        {name: max(rate, flops["fp32"]) for name, rate in flops.items()}, 2 * copied / timing.p20
    )


def _matmul_rate(dtype: torch.dtype, size: int, device: torch.device, budget: float) -> float:
    """FLOP/s of matmuls of `size`, or of its largest half, quarter, … that `budget` allows."""
    tried = max(1, size // 16)
    while True:
        a, b = (torch.randn(2, tried, tried, device=device).to(dtype) for _ in range(2))
        matmul = Version(lambda i, a=a, b=b: (a[i % 2] @ b[i % 2],))
        last = tried == size
        share = budget if last else budget / 64
        timing = measure({"matmul": matmul}, device=device, budget=share)["matmul"].timing
        larger = min(2 * tried, size)
        if last or timing.median * (larger / tried) ** 3 > budget:
            return 2 * tried**3 / timing.p20
        tried = larger
