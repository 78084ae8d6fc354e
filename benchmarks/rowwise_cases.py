"""The cases of the ops that work on rows: their bytes, their grids and their inputs.

Layer norm, RMS norm, softmax, rotary, sinusoidal positions and SwiGLU are bound by memory: they
are given in bytes per second, each tensor read and written once. The limit of a case is a copy
between two tensors that stand ready, of the same number of bytes, which takes its turns among the
versions.

A backward pass is timed by itself, on graphs that were recorded before, for all versions alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .versions import DTYPES, Outputs

INPUT_SETS = 2
# How many dimensions the shape of a case has, in the order in which the ops are reported.
DIMENSIONS = {
    "layer_norm": 2, "rms_norm": 2, "softmax": 2, "rotary": 4, "sinusoidal": 3, "swiglu": 2,
}  # fmt: skip
NORMS = ("layer_norm", "rms_norm")
WIDE = ("layer_norm", "rms_norm", "softmax")


@dataclass(frozen=True)
class Case:
    """One call: (rows, width) of a norm, a softmax or SwiGLU's gate and of its up, (B, H, S, D) of
    rotary's q and of its k, (B, S, W) of sinusoidal positions. `residual` is added before a norm
    and returned as well.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    backward: bool = False
    residual: bool = False

    bound_by_bytes = True

    def __post_init__(self) -> None:
        if self.op not in DIMENSIONS:
            raise ValueError(f"Case: got op={self.op!r}, expected one of {list(DIMENSIONS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: got dtype={self.dtype!r}, expected one of {list(DTYPES)}")
        if len(self.shape) != DIMENSIONS[self.op]:
            raise ValueError(
                f"Case: got shape={self.shape} for {self.op}, "
                f"expected {DIMENSIONS[self.op]} dimensions"
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
        k, both results and the tables, backward the same. SwiGLU: gate, up and out; backward dout,
        gate, up and the gradients of both.
        """
        elements = torch.Size(self.shape).numel()
        if self.op == "swiglu":
            return DTYPES[self.dtype].itemsize * elements * (5 if self.backward else 3)
        if self.op == "rotary":
            return DTYPES[self.dtype].itemsize * (4 * elements + self.shape[-2] * self.shape[-1])
        tensors = 3 + self.residual if self.backward else 2 + 2 * self.residual
        vectors = {"layer_norm": (2, 3), "rms_norm": (1, 2)}.get(self.op, (0, 0))[self.backward]
        return DTYPES[self.dtype].itemsize * (tensors * elements + vectors * self.shape[-1])

    @property
    def work(self) -> float:
        """What a second of this case is counted in."""
        return self.bytes


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
    """Residuals, the published layer norm of 1024 rows of 12288, rotary, sinusoidal and SwiGLU."""
    gpu = device.type == "cuda"
    chosen = []
    for dtype, backward in itertools.product(("fp32", "bf16"), (False, True)):
        chosen.append(Case("layer_norm", (1024, 12288), dtype, backward))
        rows = (8192, 4096) if gpu else (2048, 1024)
        chosen += [Case(op, rows, dtype, backward, residual=True) for op in NORMS]
        heads = (4, 32, 4096, 128) if gpu else (1, 16, 1024, 64)
        chosen.append(Case("rotary", heads, dtype, backward))
        chosen.append(Case("swiglu", (8192, 14336) if gpu else (2048, 5632), dtype, backward))
    tokens = (8, 4096, 2048) if gpu else (2, 1024, 1024)
    return chosen + [Case("sinusoidal", tokens, dtype) for dtype in ("fp32", "bf16")]


def quick_grid(device: torch.device) -> list[Case]:
    """Rows in the cache, rows beyond it and a single one; residuals, positions and SwiGLU."""
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
    order = list(DIMENSIONS)
    return sorted(cases, key=lambda case: order.index(case.op))


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A case with its input sets, each (inputs of the op, gradients of its outputs)."""

    case: Case
    sets: list[tuple[Outputs, Outputs]]
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.sets[0][0][0].device)


def draw(case: Case, random: Callable[..., Tensor]) -> Outputs:
    """One set of inputs; what has rows has them in the second to last dimension.

    Norms: x, weight, for layer norm bias, and the residual where there is one. Softmax and
    sinusoidal positions: x. Rotary: q, k and the tables cos, sin (S, D/2) of positions 0 to S − 1.
    SwiGLU: gate and up.
    """
    x, width = random(*case.shape), case.shape[-1]
    if case.op == "rotary":
        k = random(*case.shape)
        turns = 10000.0 ** (-torch.arange(0, width, 2, device=x.device).double() / width)
        phases = torch.arange(case.shape[-2], device=x.device).double()[:, None] * turns
        return x, k, phases.cos().to(x.dtype), phases.sin().to(x.dtype)
    if case.op == "swiglu":
        return x, random(*case.shape)
    if case.op not in NORMS:
        return (x,)
    inputs = [x, 1 + 0.2 * random(width)]
    if case.op == "layer_norm":
        inputs.append(random(width))
    if case.residual:
        inputs.append(random(*case.shape))
    return tuple(inputs)


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

        inputs = draw(case, random)
        outputs = 2 if case.op == "rotary" or case.residual else 1
        return inputs, tuple(random(*case.shape) for _ in range(outputs if case.backward else 0))

    return Problem(case, [inputs_of(n) for n in range(INPUT_SETS)])
