"""The attention cases, and what one row of the result says about each.

FLOPs: 2·B·H·Sq·Sk·(D + Dv), halved for causal; a backward pass counts 2.5 times as much again.
Bytes: every input once, every output once. A decoding step is bound by bytes and given in GB/s,
all else in FLOP/s.

A GPU has a grid of its own, the one in which kernels for it are published. In that the backward
pass is timed by itself, on graphs that were recorded before, for all versions alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .accuracy import expected_attention
from .figures import figures_of, ratios, times_as_fast
from .harness import DTYPES, Limits, Version, measure
from .peers import COMPILED, FLASH, Problem, build_versions, builders, ours_on, peers_on

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
# What is compiled anew for every length may run out of time: the most telling lengths come first.
GPU_LENGTHS = (2048, 16384, 8192, 4096, 1024, 512)
INPUT_SETS = 2
COMPILE_SECONDS = 60.0
DERIVED = ("label", "passes", "flops", "bytes")


@dataclass(frozen=True)
class Case:
    """One call of attention: q (batch, heads, seq_q, head_dim) against seq_k keys and values.

    `backward` times forward and backward, with `alone` too the backward pass by itself.
    """

    batch: int
    heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    causal: bool
    dtype: str
    backward: bool = False
    regime: str = "self-attention"
    alone: bool = False

    def __post_init__(self) -> None:
        if self.alone and not self.backward:
            raise ValueError("Case: got alone without backward, which is what it is about")
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: got dtype={self.dtype!r}, expected one of {list(DTYPES)}")
        if self.causal and self.seq_q != self.seq_k:
            raise ValueError(
                f"Case: got causal with seq_q={self.seq_q} and seq_k={self.seq_k}, expected equal "
                "lengths: the peers do not agree on the diagonal of others"
            )

    @property
    def label(self) -> str:
        """What tells the case apart from the others, for people and as a pytest id."""
        length = f"{self.seq_q}" if self.seq_q == self.seq_k else f"{self.seq_q}v{self.seq_k}"
        shape = f"{self.batch}x{self.heads}x{length}x{self.head_dim}"
        kind = "causal" if self.causal else "full"
        return f"{self.dtype} {shape} {kind} {self.passes}"

    @property
    def passes(self) -> str:
        return "bwd" if self.alone else "fwd+bwd" if self.backward else "fwd"

    @property
    def bound_by_bytes(self) -> bool:
        return self.seq_q == 1

    @property
    def flops(self) -> float:
        forward = 2 * self.batch * self.heads * self.seq_q * self.seq_k * 2 * self.head_dim
        times = {"fwd": 1.0, "fwd+bwd": 3.5, "bwd": 2.5}[self.passes]
        return forward * (0.5 if self.causal else 1.0) * times

    @property
    def bytes(self) -> int:
        """q, k, v read and out written; backward: out and dout read too, dq, dk, dv written."""
        query_like = self.batch * self.heads * self.seq_q * self.head_dim
        key_like = self.batch * self.heads * self.seq_k * self.head_dim
        of_queries, of_keys = {"fwd": (2, 2), "fwd+bwd": (5, 4), "bwd": (4, 4)}[self.passes]
        return DTYPES[self.dtype].itemsize * (of_queries * query_like + of_keys * key_like)

    @property
    def work(self) -> float:
        """What a second of this case is counted in: bytes or FLOPs."""
        return self.bytes if self.bound_by_bytes else self.flops

    def limit(self, limits: Limits) -> float:
        if self.bound_by_bytes:
            return limits.bytes_per_second
        return limits.flops_per_second[self.dtype]


# --- the grids -----------------------------------------------------------------------------------


def _square(
    device: torch.device, length: int, head_dim: int, causal: bool, dtype: str, backward: bool
) -> Case:
    """Self-attention with as many batches and heads as the device needs to be busy."""
    gpu = device.type == "cuda"
    batch = max(1, (16384 if gpu else 1024) // length)
    heads = 2048 // head_dim if gpu else 8
    return Case(batch, heads, length, length, head_dim, causal, dtype, backward)


def _special_cases() -> list[Case]:
    bert = [
        Case(8, 12, 128, 128, 64, False, dtype, backward, regime="BERT-like")
        for dtype, backward in itertools.product(DTYPES, (False, True))
    ]
    decode = [Case(1, 32, 1, 8192, 128, False, dtype, regime="decode") for dtype in DTYPES]
    return bert + decode


def gpu_grid(device: torch.device) -> list[Case]:
    """16k tokens of width 2048 in bf16: lengths 512 to 16k, D 64 and 128, full and causal.

    Forward, and the backward pass by itself; a BERT-like and a decoding case as well.
    """
    chosen = []
    for n, head_dim, causal, backward in itertools.product(
        GPU_LENGTHS, (64, 128), (False, True), (False, True)
    ):
        case = _square(device, n, head_dim, causal, "bf16", backward)
        chosen.append(replace(case, alone=backward))
    return chosen + [case for case in _special_cases() if case.dtype == "bf16"]


def full_grid(device: torch.device) -> list[Case]:
    """Lengths 128 to 8192, D 64 and 128, full and causal, three dtypes, forward and backward.

    On a GPU its own grid as well, and first.
    """
    axes = itertools.product((False, True), (64, 128), (False, True), DTYPES, LENGTHS)
    squares = [_square(device, n, d, causal, dtype, bwd) for bwd, d, causal, dtype, n in axes]
    first = gpu_grid(device) if device.type == "cuda" else []
    return list(dict.fromkeys(first + squares + _special_cases()))


def quick_grid(device: torch.device) -> list[Case]:
    """A subset of the full grid with every regime in it, for a few minutes on a CPU.

    A series over lengths in each dtype (causal, D 64), two long shapes full and causal, training
    steps on those, and the BERT-like and decoding cases.
    """
    chosen: dict[Case, None] = {}
    for dtype, length in itertools.product(DTYPES, (128, 512, 2048, 8192)):
        chosen[_square(device, length, 64, True, dtype, False)] = None
    for dtype, causal in itertools.product(DTYPES, (False, True)):
        chosen[_square(device, 2048, 128, causal, dtype, False)] = None
        chosen[_square(device, 4096, 64, causal, dtype, False)] = None
    for dtype in DTYPES:
        chosen[_square(device, 2048, 128, True, dtype, True)] = None
    for dtype in ("fp32", "bf16"):
        chosen[_square(device, 4096, 64, True, dtype, True)] = None
    for case in _special_cases():
        if case.dtype != "fp16":
            chosen[case] = None
    return list(chosen)


# --- running -------------------------------------------------------------------------------------


def make_problem(
    case: Case, device: torch.device, seed: int, score_bytes: float = 2**30
) -> Problem:
    """The case with fresh normal random inputs; the same seed gives the same inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(seq: int) -> torch.Tensor:
        shape = (case.batch, case.heads, seq, case.head_dim)
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(DTYPES[case.dtype])

    sets = [
        (random(case.seq_q), random(case.seq_k), random(case.seq_k), random(case.seq_q))
        for _ in range(INPUT_SETS)
    ]
    return Problem(case, sets, score_bytes)


def run_case(
    problem: Problem,
    *,
    limits: Limits,
    budget: float,
    seed: int,
    peers: Sequence[str] | None = None,
    versions: dict[str, Version] | None = None,
) -> dict[str, Any]:
    """One row: every version's time, rate, memory and error on this case.

    `peers` are by default all that the device can have; `versions` replaces fusedattn and them.
    """
    case = problem.case
    skipped: dict[str, str] = {}
    prepared: dict[str, float] = {}
    if versions is None:
        names = peers_on(problem.device) if peers is None else peers
        versions, prepared = build_versions(problem, builders(problem.device, names), skipped)
    measured = measure(
        versions, device=problem.device, budget=budget, sets=len(problem.sets), failed=skipped
    )
    used = {m.set_index for m in measured.values()}
    expected = {}
    for index in used:
        q, k, v, dout = problem.sets[index]
        expected[index] = expected_attention(
            q, k, v, causal=case.causal, dout=dout if case.backward else None, seed=seed
        )
    limit, ours = case.limit(limits), list(ours_on(problem.device))
    rows = {
        name: figures_of(m, versions[name], expected[m.set_index].error(m.output), case.work, limit)
        for name, m in measured.items()
    }
    return {
        "case": {**asdict(case), **{name: getattr(case, name) for name in DERIVED}},
        "unit": "byte/s" if case.bound_by_bytes else "FLOP/s",
        "limit": limit,
        "versions": rows,
        "skipped": skipped,
        "prepared_s": prepared,
        **ratios(rows, ours),
        "times_flash": times_as_fast(rows, ours, FLASH),
    }


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    *,
    limits: Limits,
    seconds: float,
    seed: int,
    thorough: bool = False,
    progress: Callable[[int, str], None] = lambda done, label: None,
) -> Iterator[dict[str, Any]]:
    """The rows of all cases, in about `seconds` seconds; each case gets its share of what is left.

    Unless `thorough`, versions that are compiled anew for every shape, which takes many seconds,
    stand beside the cases of `_worth_compiling` alone, on a GPU until COMPILE_SECONDS are over; and
    versions that store all scores stop at 128 MiB of them (on a GPU 2 GiB).
    """
    end = time.perf_counter() + seconds
    gpu = device.type == "cuda"
    score_bytes = (2**33 if gpu else 2**30) if thorough else 2**31 if gpu else 2**27
    compiled = 0.0
    for n, case in enumerate(cases):
        progress(n, case.label)
        left_out = {}
        for name in COMPILED:
            if thorough or name not in peers_on(device):
                continue
            if not _worth_compiling(name, case, device):
                left_out[name] = "compiled for a few cases, with --full for all"
            elif gpu and compiled > COMPILE_SECONDS:
                left_out[name] = "the time for compiling was over, with --full there is enough"
        names = [name for name in peers_on(device) if name not in left_out]
        left = max(0.0, end - time.perf_counter())
        problem = make_problem(case, device, seed + n, score_bytes)
        # Half of the share is for timing; warming up, the reference and compiling take the rest.
        budget = max(0.2, 0.5 * left / (len(cases) - n))
        row = run_case(problem, limits=limits, budget=budget, seed=seed + n, peers=names)
        row["skipped"].update(left_out)
        compiled += sum(row["prepared_s"].get(name, 0.0) for name in COMPILED)
        yield row
    progress(len(cases), "done")


def _worth_compiling(name: str, case: Case, device: torch.device) -> bool:
    on_gpu = device.type == "cuda"
    if case.dtype != ("bf16" if on_gpu else "fp32"):
        return False
    if on_gpu and name == "flex" and not case.bound_by_bytes:
        return True
    long = (case.seq_q, case.head_dim, case.causal) == (2048, 128, True)
    return case.regime == "BERT-like" or (long and (on_gpu or not case.backward))
