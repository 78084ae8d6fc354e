"""Runs cases: their versions side by side, and the row of the result that each case gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import (
    attention_cases,
    attention_peers,
    option_cases,
    option_peers,
    rowwise_cases,
    rowwise_peers,
)
from .figures import figures_of, ratios, times_as_fast
from .harness import Limits, measure
from .versions import FLASH, Builder, Version, build_versions, ours_on

COPY = "copy"


class Part:
    """One kind of cases.

    compiled: the versions that are compiled anew for every shape, which takes many seconds.
    compile_seconds: on a GPU, for all of those together.
    least_seconds: for timing a case, however little time is left.
    derived: what a row says of its case beside the fields.
    """

    compiled: tuple[str, ...]
    compile_seconds: float
    least_seconds: float
    derived: tuple[str, ...]

    def problem(self, case: Any, device: torch.device, seed: int, thorough: bool = False) -> Any:
        """The case with fresh normal random inputs; the same seed gives the same inputs."""
        raise NotImplementedError

    def peers(self, case: Any, device: torch.device) -> list[str]:
        """The names of the peers that the case can have on the device."""
        raise NotImplementedError

    def builders(self, device: torch.device, names: Iterable[str]) -> dict[str, Builder]:
        """Our versions on a device, and the named peers."""
        raise NotImplementedError

    def expected(self, problem: Any, index: int, seed: int) -> Any:
        """What every version should give on the input set of this index."""
        raise NotImplementedError

    def worth_compiling(self, name: str, case: Any, device: torch.device) -> bool:
        """Whether a version that is compiled stands beside this case without `thorough`."""
        raise NotImplementedError


def _score_bytes(device: torch.device, thorough: bool) -> float:
    """Versions that store all scores stop at 128 MiB of them, on a GPU at 2 GiB."""
    gpu = device.type == "cuda"
    return (2**33 if gpu else 2**30) if thorough else 2**31 if gpu else 2**27


class _Attention(Part):
    compiled = attention_peers.COMPILED
    compile_seconds, least_seconds = 60.0, 0.2
    derived = ("label", "passes", "flops", "bytes")
    builders = staticmethod(attention_peers.builders)
    expected = staticmethod(attention_peers.expected_of)
    worth_compiling = staticmethod(attention_peers.worth_compiling)

    def problem(self, case: Any, device: torch.device, seed: int, thorough: bool = False) -> Any:
        return attention_cases.make_problem(case, device, seed, _score_bytes(device, thorough))

    def peers(self, case: Any, device: torch.device) -> list[str]:
        return attention_peers.peers_on(device)


class _Options(Part):
    compiled = option_peers.COMPILED
    compile_seconds, least_seconds = 60.0, 0.2
    derived = ("label", "title", "passes", "flops")
    builders = staticmethod(option_peers.builders)
    expected = staticmethod(option_peers.expected_of)
    worth_compiling = staticmethod(option_peers.worth_compiling)

    def problem(self, case: Any, device: torch.device, seed: int, thorough: bool = False) -> Any:
        return option_cases.make_problem(case, device, seed, _score_bytes(device, thorough))

    def peers(self, case: Any, device: torch.device) -> list[str]:
        return list(option_peers.PEERS)


class _Rowwise(Part):
    compiled = (rowwise_peers.COMPILED,)
    compile_seconds, least_seconds = 15.0, 0.1
    derived = ("label", "bytes")
    builders = staticmethod(rowwise_peers.builders)
    expected = staticmethod(rowwise_peers.expected_of)

    def problem(self, case: Any, device: torch.device, seed: int, thorough: bool = False) -> Any:
        return rowwise_cases.make_problem(case, device, seed)

    def peers(self, case: Any, device: torch.device) -> list[str]:
        return rowwise_peers.peers_of(case)

    def worth_compiling(self, name: str, case: Any, device: torch.device) -> bool:
        return rowwise_peers.worth_compiling(case, device)


ATTENTION, ROWWISE, OPTIONS = _Attention(), _Rowwise(), _Options()


def copy_of(case: Any, device: torch.device, sets: int = 2) -> Version:
    """A copy that reads and writes as many bytes as the case, between tensors that stand ready."""
    count, row = max(1, case.bytes // 8), 16
    values = torch.rand(count + (sets - 1) * row, device=device)
    sources = [values[n * row : n * row + count] for n in range(sets)]
    target = torch.empty_like(sources[0])
    return Version(lambda i: (target.copy_(sources[i % sets]),), torch.no_grad)


def run_case(
    part: Part,
    problem: Any,
    *,
    limits: Limits | None = None,
    budget: float,
    seed: int,
    peers: Sequence[str] | None = None,
    versions: dict[str, Version] | None = None,
) -> dict[str, Any]:
    """One row: every version's time, rate, memory and error on this case.

    `limits` are what the machine reaches; without them the limit is a copy of as many bytes, which
    takes its turns among the versions. `peers` are by default all that the case can have;
    `versions` replaces fusedattn and them.
    """
    case, device = problem.case, problem.device
    skipped: dict[str, str] = {}
    prepared: dict[str, float] = {}
    if versions is None:
        names = part.peers(case, device) if peers is None else peers
        versions, prepared = build_versions(problem, part.builders(device, names), skipped)
    beside = {} if limits else {COPY: copy_of(case, device, len(problem.sets))}
    measured = measure(
        {**beside, **versions},
        device=device,
        budget=budget,
        sets=len(problem.sets),
        failed=skipped,
    )
    row: dict[str, Any] = {
        "case": {**asdict(case), **{name: getattr(case, name) for name in part.derived}},
        "unit": "byte/s" if case.bound_by_bytes else "FLOP/s",
    }
    if limits:
        row["limit"] = limit = case.limit(limits)
    else:
        copy = measured.pop(COPY).timing
        row["limit"] = limit = case.bytes / copy.median
        row["copy"] = {f"{name}_s": getattr(copy, name) for name in ("median", "p20", "p80")}
    used = {m.set_index for m in measured.values()}
    expected = {index: part.expected(problem, index, seed) for index in used}
    rows = {
        name: figures_of(m, versions[name], expected[m.set_index].error(m.output), case.work, limit)
        for name, m in measured.items()
    }
    ours = list(ours_on(device))
    row |= {"versions": rows, "skipped": skipped, "prepared_s": prepared, **ratios(rows, ours)}
    if part is ATTENTION:
        row["times_flash"] = times_as_fast(rows, ours, FLASH)
    return row


def run_cases(
    part: Part,
    cases: Sequence[Any],
    device: torch.device,
    *,
    limits: Limits | None = None,
    seconds: float,
    seed: int,
    thorough: bool = False,
    peers: Sequence[str] | None = None,
    progress: Callable[[int, str], None] = lambda done, label: None,
) -> Iterator[dict[str, Any]]:
    """The rows of all cases, in about `seconds` seconds; each case gets its share of what is left.

    Unless `thorough`, versions that are compiled anew for every shape stand beside those cases
    alone that are worth it, on a GPU until the time for compiling is over. `peers` are the names
    of those to stand beside ours, all of them and in any case.
    """
    end = time.perf_counter() + seconds
    compiling = 0.0
    for n, case in enumerate(cases):
        progress(n, case.label)
        in_time = device.type != "cuda" or compiling <= part.compile_seconds
        known = [name for name in part.peers(case, device) if peers is None or name in peers]
        every = thorough or peers is not None
        left_out = {} if every else _not_compiled(part, case, device, known, in_time)
        left = max(0.0, end - time.perf_counter())
        # Half of the share is for timing; inputs, warming up, the reference and compiling take the
        # rest.
        budget = max(part.least_seconds, 0.5 * left / (len(cases) - n))
        row = run_case(
            part,
            part.problem(case, device, seed + n, thorough),
            limits=limits,
            budget=budget,
            seed=seed + n,
            peers=[name for name in known if name not in left_out],
        )
        row["skipped"].update(left_out)
        compiling += sum(row["prepared_s"].get(name, 0.0) for name in part.compiled)
        yield row
    progress(len(cases), "done")


def _not_compiled(
    part: Part, case: Any, device: torch.device, known: Iterable[str], in_time: bool
) -> dict[str, str]:
    """Which of the known versions are not compiled for this case, and why."""
    left_out = {}
    for name in part.compiled:
        if name in known and not part.worth_compiling(name, case, device):
            left_out[name] = "compiled for a few cases, with --full for all"
        elif name in known and not in_time:
            left_out[name] = "the time for compiling was over, with --full there is enough"
    return left_out
