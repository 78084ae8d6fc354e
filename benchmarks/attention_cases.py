"""The attention cases: their work, their grids and their inputs.

FLOPs: 2·B·H·Sq·Sk·(D + Dv), halved for causal; a backward pass counts 2.5 times as much again.
Bytes: every input once, every output once. A decoding step is bound by bytes and given in GB/s,
all else in FLOP/s.

A GPU has a grid of its own, the one in which kernels for it are published. In that the backward
pass is timed by itself, on graphs that were recorded before, for all versions alike.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .harness import Limits
from .versions import DTYPES, Unavailable

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
# What is compiled anew for every length may run out of time: the most telling lengths come first.
GPU_LENGTHS = (2048, 16384, 8192, 4096, 1024, 512)
INPUT_SETS = 2


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


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A case with its input sets, each (q, k, v, dout): (B, H, Sq, D), (B, H, Sk, D) twice, and
    dout like the output. `score_bytes` is the most that a matrix of Sq·Sk scores may take.
    """

    case: Any  # a Case, of a group that has more inputs its own
    sets: list[tuple[Tensor, ...]]
    score_bytes: float = 2**30
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.sets[0][0].device)

    def refuse_huge_scores(self) -> None:
        """Raise `Unavailable` where a version that stores all scores would take too much."""
        case = self.case
        item = DTYPES[case.dtype].itemsize
        needed = case.batch * case.heads * case.seq_q * case.seq_k * item
        if needed > self.score_bytes:
            raise Unavailable(
                f"its matrix of scores takes {needed / 2**20:,.0f} MiB, "
                f"over the limit of {self.score_bytes / 2**20:,.0f} MiB here"
            )


def make_problem(
    case: Case, device: torch.device, seed: int, score_bytes: float = 2**30
) -> Problem:
    """The case with fresh normal random inputs; the same seed gives the same inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(seq: int) -> Tensor:
        shape = (case.batch, case.heads, seq, case.head_dim)
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(DTYPES[case.dtype])

    sets: list[tuple[Tensor, ...]] = [
        (random(case.seq_q), random(case.seq_k), random(case.seq_k), random(case.seq_q))
        for _ in range(INPUT_SETS)
    ]
    return Problem(case, sets, score_bytes)
