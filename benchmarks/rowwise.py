"""The cases of the ops that work on rows, and what one row of the result says about each.

Layer norm, RMS norm, softmax, rotary and sinusoidal positions are bound by memory: they are given
in bytes per second, each tensor read and written once. The limit of a case is a copy between two
tensors that stand ready, of the same number of bytes, which takes its turns among the versions.

A backward pass is timed by itself, on graphs that were recorded before, for all versions alike.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .accuracy import ExpectedRows, expected_rows
from .figures import figures_of, ratios
from .harness import DTYPES, Outputs, Version, measure
from .peers import build_versions, ours_on
from .rowwise_peers import COMPILED, OPS, PEERS, Problem, builders

INPUT_SETS = 2
COMPILE_SECONDS = 15.0
COPY = "copy"
NORMS = ("layer_norm", "rms_norm")
WIDE = ("layer_norm", "rms_norm", "softmax")


@dataclass(frozen=True)
class Case:
    """One call: (rows, width) of a norm or softmax, (B, H, S, D) of rotary's q and of its k,
    (B, S, W) of sinusoidal positions. `residual` is added before a norm and returned as well.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    backward: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"Case: got op={self.op!r}, expected one of {list(OPS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: got dtype={self.dtype!r}, expected one of {list(DTYPES)}")
        if len(self.shape) != OPS[self.op].dimensions:
            raise ValueError(
                f"Case: got shape={self.shape} for {self.op}, "
                f"expected {OPS[self.op].dimensions} dimensions"
            )
        if self.residual and self.op not in NORMS:
            raise ValueError(f"Case: got residual for {self.op}, expected one of {NORMS}")
        if self.backward and self.op == "sinusoidal":
            raise ValueError("Case: got backward for sinusoidal, whose gradient is dout itself")

    @property
    def label(self) -> str:
        """What tells the case apart from the others, for people and as a pytest id."""
        name = f"add_{self.op}" if self.residual else self.op
        shape = "x".join(map(str, self.shape))
        return f"{name} {self.dtype} {shape} {'bwd' if self.backward else 'fwd'}"

    @property
    def bytes(self) -> int:
        """Every tensor once.

        Norm and softmax: x and out; backward: dout, x or out, dx. A residual and its sum, backward
        the gradient of the sum. Weights are read, backward their gradients written too. Rotary: q,
        k, both results and the tables, backward the same.
        """
        elements = torch.Size(self.shape).numel()
        if self.op == "rotary":
            return DTYPES[self.dtype].itemsize * (4 * elements + self.shape[-2] * self.shape[-1])
        tensors = 3 + self.residual if self.backward else 2 + 2 * self.residual
        vectors = {"layer_norm": (2, 3), "rms_norm": (1, 2)}.get(self.op, (0, 0))[self.backward]
        return DTYPES[self.dtype].itemsize * (tensors * elements + vectors * self.shape[-1])


# --- the grids -----------------------------------------------------------------------------------


def full_grid(device: torch.device) -> list[Case]:
    """Rows of 1k to 64k at a constant number of bytes, forward and backward, and `_special_cases`.

    On a CPU the shapes of the quick grid as well.
    """
    size = 2**27 if device.type == "cuda" else 2**24
    chosen: dict[Case, None] = {}
    widths = [1024 * 2**n for n in range(7)]
    for op, dtype, backward, width in itertools.product(
        WIDE, ("fp32", "bf16"), (False, True), widths
    ):
        rows = size // DTYPES[dtype].itemsize // width
        chosen[Case(op, (rows, width), dtype, backward)] = None
    chosen.update(dict.fromkeys(_special_cases(device)))
    if device.type != "cuda":
        chosen.update(dict.fromkeys(quick_grid(device)))
    return _by_op(chosen)


def _special_cases(device: torch.device) -> list[Case]:
    """Residuals, the published layer norm of 1024 rows of 12288, rotary and sinusoidal."""
    gpu = device.type == "cuda"
    chosen = []
    for dtype, backward in itertools.product(("fp32", "bf16"), (False, True)):
        chosen.append(Case("layer_norm", (1024, 12288), dtype, backward))
        rows = (8192, 4096) if gpu else (2048, 1024)
        chosen += [Case(op, rows, dtype, backward, residual=True) for op in NORMS]
        heads = (4, 32, 4096, 128) if gpu else (1, 16, 1024, 64)
        chosen.append(Case("rotary", heads, dtype, backward))
    tokens = (8, 4096, 2048) if gpu else (2, 1024, 1024)
    return chosen + [Case("sinusoidal", tokens, dtype) for dtype in ("fp32", "bf16")]


def quick_grid(device: torch.device) -> list[Case]:
    """Rows in the cache, rows beyond it and a single one; residuals, rotary and sinusoidal."""
    shapes = ((2048, 1024), (4096, 4096), (1, 65536))
    chosen = [
        Case(op, shape, dtype, backward)
        for op, shape, dtype, backward in itertools.product(
            WIDE, shapes, ("fp32", "bf16"), (False, True)
        )
    ]
    special = _special_cases(device)
    chosen += [c for c in special if c.op not in WIDE or (c.residual and not c.backward)]
    return _by_op(chosen)


def _by_op(cases: Iterable[Case]) -> list[Case]:
    order = list(OPS)
    return sorted(cases, key=lambda case: order.index(case.op))


# --- running -------------------------------------------------------------------------------------


def windows(buffer: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The input sets' tensors of one kind: windows on one buffer, each a row after the last.

    The values change from call to call, the memory does not: what fits into a processor's caches is
    measured there, and what does not, is not.
    """
    size, row = math.prod(shape), shape[-1]
    return [buffer[n * row : n * row + size].view(*shape) for n in range(INPUT_SETS)]


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """The case with fresh normal random inputs; the same seed gives the same inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    made: list[list[Tensor]] = []

    def inputs_of(n: int) -> tuple[Outputs, Outputs]:
        place = itertools.count()

        def random(*shape: int) -> Tensor:
            if (at := next(place)) == len(made):
                elements = math.prod(shape) + (INPUT_SETS - 1) * shape[-1]
                values = torch.randn(elements, generator=generator, device=device)
                made.append(windows(values.to(DTYPES[case.dtype]), shape))
            return made[at][n]

        inputs = OPS[case.op].inputs(case, random)
        outputs = 2 if case.op == "rotary" or case.residual else 1
        return inputs, tuple(random(*case.shape) for _ in range(outputs if case.backward else 0))

    return Problem(case, [inputs_of(n) for n in range(INPUT_SETS)])


def copy_of(case: Case, device: torch.device) -> Version:
    """A copy that reads and writes as many bytes as the case, between tensors that stand ready."""
    count, row = max(1, case.bytes // 8), 16
    values = torch.rand(count + (INPUT_SETS - 1) * row, device=device)
    sources = [values[n * row : n * row + count] for n in range(INPUT_SETS)]
    target = torch.empty_like(sources[0])
    return Version(lambda i: (target.copy_(sources[i % INPUT_SETS]),), torch.no_grad)


def run_case(
    problem: Problem,
    *,
    budget: float,
    seed: int,
    peers: Sequence[str] | None = None,
    versions: dict[str, Version] | None = None,
) -> dict[str, Any]:
    """One row: every version's time, rate, memory and error on this case.

    `peers` are by default all; `versions` replaces fusedattn and them.
    """
    case, device = problem.case, problem.device
    skipped: dict[str, str] = {}
    prepared: dict[str, float] = {}
    if versions is None:
        all_of = builders(case, device)
        names = [*ours_on(device), *(PEERS if peers is None else peers)]
        known = {name: all_of[name] for name in names if name in all_of}
        versions, prepared = build_versions(problem, known, skipped)
    measured = measure(
        {COPY: copy_of(case, device), **versions},
        device=device,
        budget=budget,
        sets=len(problem.sets),
        failed=skipped,
    )
    copy = measured.pop(COPY).timing
    limit = case.bytes / copy.median
    expected = {
        index: expected_of(problem, index, seed)
        for index in {m.set_index for m in measured.values()}
    }
    rows = {
        name: figures_of(
            m, versions[name], expected[m.set_index].error(m.output), case.bytes, limit
        )
        for name, m in measured.items()
    }
    return {
        "case": {**asdict(case), "label": case.label, "bytes": case.bytes},
        "unit": "byte/s",
        "limit": limit,
        "copy": {f"{name}_s": getattr(copy, name) for name in ("median", "p20", "p80")},
        "versions": rows,
        "skipped": skipped,
        "prepared_s": prepared,
        **ratios(rows, ours_on(device)),
    }


def expected_of(problem: Problem, index: int, seed: int) -> ExpectedRows:
    """What every version should give on the input set of this index."""
    case, op = problem.case, OPS[problem.case.op]
    inputs, douts = problem.sets[index]
    return expected_rows(
        op.reference,
        inputs,
        leaves=len(inputs) - op.tables,
        douts=douts if case.backward else None,
        summands=op.summands,
        seed=seed,
    )


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float,
    seed: int,
    thorough: bool = False,
    progress: Callable[[int, str], None] = lambda done, label: None,
) -> Iterator[dict[str, Any]]:
    """The rows of all cases, in about `seconds` seconds; each case gets its share of what is left.

    Unless `thorough`, `torch.compile` stands beside the cases of `worth_compiling` alone, on a GPU
    until COMPILE_SECONDS are over.
    """
    end = time.perf_counter() + seconds
    compiled = 0.0
    for n, case in enumerate(cases):
        progress(n, case.label)
        in_time = device.type != "cuda" or compiled < COMPILE_SECONDS
        compiling = thorough or (in_time and worth_compiling(case, device))
        names = [name for name in PEERS if compiling or name != COMPILED]
        left = max(0.0, end - time.perf_counter())
        # Half of the share is for timing; inputs, warming up and the reference take the rest.
        budget = max(0.1, 0.5 * left / (len(cases) - n))
        row = run_case(
            make_problem(case, device, seed + n), budget=budget, seed=seed + n, peers=names
        )
        if not compiling:
            row["skipped"][COMPILED] = "compiled for a few cases, with --full for all"
        compiled += row["prepared_s"].get(COMPILED, 0.0)
        yield row
    progress(len(cases), "done")


def worth_compiling(case: Case, device: torch.device) -> bool:
    """Whether `torch.compile` stands beside this case without `thorough`."""
    if device.type != "cuda":
        return case in (
            Case("rms_norm", (2048, 1024), "fp32"),
            Case("rotary", (1, 16, 1024, 64), "fp32"),
        )
    wide = case.op in WIDE and case.shape[-1] in (4096, 12288, 32768)
    return case.dtype == "bf16" and (wide or case.op not in WIDE)
