"""Every barrier, shuffle, bound and shared address of the CUDA C++ kernels of norms, softmax,
rotary and SwiGLU, wrong one at a time: what tests/test_cuda_flaws.py does with attention.

There are no atomic additions in these kernels and no asynchronous copies.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32
from cases.norm import NormCase
from cases.norm import results as norm_results
from cases.position import RotaryCase, launch_rotary
from cases.softmax import SoftmaxCase
from cases.softmax import results as softmax_results
from cases.swiglu import inputs, results
from fusedattn import _native
from fusedattn.ops.rotary_config import RotaryConfig
from test_cuda_flaws import Run, hunt
from test_cuda_rowwise import layer
from torch import Tensor

emulated = _native.cuda_emulated()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator"),
]

SOURCES = Path(__file__).parents[1] / "csrc/cuda"
# Of wide rows: two blocks hold one in shared memory; or one block does not, and reads it again.
CLUSTER = {"capability": 90, "max_shared_bytes": 24000}
AGAIN = {"capability": 80, "max_shared_bytes": 2304}


class Repeated(Run):
    """A call whose results, here held to be right, have to come out the same again."""

    def __init__(self, call: Callable[[], dict[str, Tensor]], *kernels: str, **device: int) -> None:
        self.call, self.kernels, self.device = call, kernels, device
        self.expected = self.compute()

    def compute(self) -> dict[str, Tensor]:
        emulated.device(**self.device)
        return self.call()

    def hold(self, found: dict[str, Tensor]) -> None:
        for name, x in found.items():
            torch.testing.assert_close(x, self.expected[name], equal_nan=True)


def norm(case: NormCase, *kernels: str, **device: int) -> Repeated:
    made = case.inputs()
    names = (*(f"norm_{name}" for name in kernels), "norm_backward_columns")
    return Repeated(
        lambda: norm_results(made, case, fusedattn, backend="cuda_emulated"), *names, **device
    )


def norms() -> list[Repeated]:
    once, again = "backward_rows", ("backward_sums", "backward_strips")
    common = {"weight": F16, "bias": F16, "residual": F16}
    return [
        norm(layer(9, 20), "forward_rows", once),
        norm(layer(5, 1500), "forward_rows", once),
        norm(layer(70, 24), "forward_rows", once),
        norm(layer(5, 264, F16, **common, dropout_p=0.3), "forward_rows", once),
        norm(layer(5, 264, F16, bias=F16, residual=F32), "forward_rows", once),
        norm(layer(20, 37), "forward_rows", *again),
        norm(layer(3, 299, BF16, residual=F32, dropout_p=0.3), "forward_rows", *again),
        norm(layer(2, 2101, residual=F32), "forward_wide", *again, **CLUSTER),
        norm(layer(2, 2101, residual=F32), "forward_wide", *again, **AGAIN),
        norm(layer(2, 8200), "forward_wide", once, **CLUSTER),
    ]


def softmax(
    shape: tuple[int, ...],
    dtype: torch.dtype = F32,
    extras: bool = False,
    causal: bool | str = False,
    ramp: float = 0.0,
    **device: int,
) -> Repeated:
    """`ramp`: scores rise by so much in a row or fall, so that only its largest will do."""
    given = (shape, (1, shape[-1])) if extras else ()
    made = SoftmaxCase(shape, F32, *given).inputs()
    x = made.pop("x") / 3 + torch.linspace(0, ramp, shape[-1])
    x[0] = x[0].flip(-1)
    made = {n: y if y.dtype == torch.bool else y.to(dtype) for n, y in {"x": x, **made}.items()}
    made |= {"dim": -1, "causal": causal, "softmax": fusedattn.softmax, "backend": "cuda_emulated"}
    return Repeated(
        lambda: softmax_results(**made), "softmax_forward", "softmax_backward", **device
    )


def softmaxes() -> list[Repeated]:
    return [
        softmax((3, 37)),
        softmax((2, 3, 5, 20), extras=True),
        softmax((2, 3, 5, 21)),
        softmax((2, 9, 44), causal="top_left"),
        softmax((2, 9, 264), F16, extras=True, causal=True),
        softmax((3, 1500)),
        softmax((3, 1500), ramp=5e4),
        softmax((2, 999), extras=True),
        softmax((2, 999), extras=True, ramp=5e4),
        softmax((2, 4101), extras=True, causal=True, **CLUSTER),
        softmax((2, 4101), extras=True, **AGAIN),
        softmax((2, 4101), **AGAIN),
        softmax((2, 4101), **CLUSTER),
        softmax((2, 4101), **CLUSTER, ramp=5e4),
    ]


def rotary(case: RotaryCase, interleaved: bool) -> Repeated:
    made = case.inputs()
    made["positions"][:, 3] = 24  # which the tables have not

    def call() -> dict[str, Tensor]:
        found = launch_rotary(made, "cuda_emulated", RotaryConfig(interleaved))
        return {name: x for name, x in zip(("out", "out2"), found, strict=True) if x is not None}

    return Repeated(call, "rotary")


def rotaries() -> list[Repeated]:
    common = {"heads": 5, "heads2": 3, "positions": "own"}
    cases = (
        RotaryCase(**common, dim=40, rotated=16, dtype=F16),
        RotaryCase(**common, dim=21, rotated=6),
        RotaryCase(**common | {"heads2": None}, dim=22, rotated=6),
        RotaryCase(**common, dim=24, rotated=24),
    )
    return [rotary(case, interleaved) for case in cases for interleaved in (False, True)]


def swiglu(*shape: int, dtype: torch.dtype = F32, joined: bool = False) -> Repeated:
    made = inputs(*shape, dtype=dtype, joined=joined)

    def call() -> dict[str, Tensor]:
        return results(fusedattn.swiglu, made, dtype, backend="cuda_emulated")

    return Repeated(call, "swiglu_forward", "swiglu_backward")


def swiglus() -> list[Repeated]:
    return [swiglu(5, 24, joined=True), swiglu(5, 23, joined=True), swiglu(3, 1100, dtype=F16)]


# Of each op what flaws it has, and those that change nothing.
COMMON = ["no barrier", "no shuffle", "own block", "next place"]
# A chunk that a block has kept is read again instead: the same numbers.
KEPT = r"bound too low, \S+\.cu:\d+ (else if|if|both =) .*kept\)(?!.*store)"
OPS = {
    # There a thread has one chunk, which exists.
    "norm": (norms, COMMON, [KEPT, r"bound too high, .* for (ColumnSums|fuse|write)"]),
    # There a score past the row is −∞.
    "softmax": (softmaxes, COMMON, [KEPT, r"bound too high, .* for softmax_forward_wide"]),
    "rotary": (rotaries, [], []),
    "swiglu": (swiglus, [], []),
}
BOUNDS = ["bound too high", "bound too low"]


@pytest.mark.parametrize("op", OPS)
def test_every_flaw_is_caught(op: str) -> None:
    torch.manual_seed(0)
    make, kinds, harmless = OPS[op]
    survivors, how = hunt(make())
    survivors = [f"{flaw} {line_of(flaw)}" for flaw in survivors]
    assert [flaw for flaw in survivors if not any(re.search(x, flaw) for x in harmless)] == []
    assert {flaw.partition(": ")[2] for flaw, by in how if by} >= {*kinds, *BOUNDS}


def line_of(flaw: str) -> str:
    """The source line of its place, where that is one of the kernels'."""
    name, line = re.search(r"(\S+):(\d+)", flaw).groups()
    path = SOURCES / name
    return path.read_text().splitlines()[int(line) - 1].strip() if path.exists() else ""


@pytest.mark.parametrize("op", OPS)
def test_nothing_goes_unwatched(op: str) -> None:
    """Each line of the kernels with a barrier or a bound is a place of a flaw."""
    torch.manual_seed(0)
    emulated.watch()
    try:
        for run in OPS[op][0]():
            run.compute()
        watched = {re.search(r"\S+:\d+", flaw)[0] for flaw in emulated.flaws()}
    finally:
        emulated.plant()
        emulated.device()
    words = re.compile(r"\b(sync_\w+\(\);|below\(|shuffle_xor\(|remote_shared\()")
    found = {
        f"{path.name}:{i}"
        for path in SOURCES.iterdir()
        if path.name.startswith(op) or (path.name == "rowwise.cuh" and op in ("norm", "softmax"))
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line.partition("//")[0])
    }
    assert found - watched == set()
    assert len(found) >= 2
