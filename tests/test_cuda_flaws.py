"""Every wait, barrier, address and tile of attention's CUDA C++ kernels, wrong one at a time.

The emulator notes which flaws the kernels could have while they run, and plants one of them: see
csrc/cuda/emulator/flaws.h. The kernels are those of the GPU. Each flaw has to end the kernel or to
fail the tolerance rule in one of the cases below; `python -m pytest -s` prints which does what.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, results
from compare import check
from fusedattn import _native
from fusedattn.ops.attention_config import AttentionBackwardCall, configure
from fusedattn.reference import functional as reference
from torch import Tensor

emulated = _native.cuda_emulated()
pytestmark = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

LITTLE, LARGE = 99 * 1024, 227 * 1024
SOURCES = Path(__file__).parents[1] / "csrc/cuda"


class Run:
    """One pass of one case, which names the kernels that it launches, held to the rule."""

    def __init__(self, case: AttentionCase, kind: str, made: dict | None = None) -> None:
        made = made or case.inputs()
        self.case, self.kind, self.made = case, kind, made
        self.ref = results(made, case, reference.attention, torch.float64)
        self.eager = results(made, case, reference.attention, case.dtype)
        exact = results(made, case, reference.attention, torch.float32)
        self.eager["lse"] = self.lse = exact["lse"]
        self.out = exact["out"].to(case.dtype)
        options = case.options() | {"deterministic": kind == "deterministic"}
        options.pop("seed", None)
        self.config = configure(case.dim, **options)
        self.kernels = {
            "forward": ("attention_forward", "attention_combine"),
            "atomics": ("attention_backward_norms", "attention_backward_rows",
                        "attention_backward_keys", "attention_backward_round", "attention_bias"),
            "deterministic": ("attention_backward_keys", "attention_backward_queries",
                              "attention_backward_bias", "attention_slopes"),
        }[kind]  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        made = self.made
        q, k, v = (made[name] for name in "qkv")
        given = {name: made[name] for name in ("kv_lengths", "bias", "alibi_slopes")}
        options = self.case.options()
        if self.kind == "forward":
            out, lse = fusedattn.attention(
                q, k, v, **given, sinks=made["sinks"], **options, return_lse=True,
                backend="cuda_emulated",
            )  # fmt: skip
            return {"out": out, "lse": lse}
        grads = {f"d{name}": torch.empty_like(made[name]) for name in "qkv"}
        for name in ("bias", "alibi_slopes"):
            grads[f"d{name}"] = None if made[name] is None else torch.empty_like(made[name])
        if given["alibi_slopes"] is not None:
            given["alibi_slopes"] = given["alibi_slopes"].view(1, -1, 1, 1)
        seed = torch.tensor([options["seed"]]) if "seed" in options else None
        call = AttentionBackwardCall(
            made["dout"], made["dlse"], self.out, self.lse, q, k, v, **given, seed=seed,
            config=self.config,
        )  # fmt: skip
        slopes = grads["dalibi_slopes"]
        views = grads | {"dalibi_slopes": None if slopes is None else slopes.view(1, -1, 1, 1)}
        emulated.attention_backward(call, *views.values(), None)
        return {name: x for name, x in grads.items() if x is not None}

    def how_it_fails(self) -> str:
        """By what a planted flaw is caught; empty if it is not."""
        try:
            found = self.compute()
        except RuntimeError as error:
            text = str(error)
            assert "emulator: " in text
            return next(word for word in CAUGHT if re.search(CAUGHT[word], text))
        try:
            self.hold(found)
        except AssertionError:
            return "result"
        return ""

    def hold(self, found: dict[str, Tensor]) -> None:
        for name, x in found.items():
            rule = {"what": name, "case": self.case, "gradient": name.startswith("d")}
            summed = name in ("dbias", "dalibi_slopes")
            if summed:  # as in cases/attention.py
                slack = 2 if name == "dalibi_slopes" else 1
                rule |= {"rows": 100, "tested": self.case.dtype, "slack": slack}
            check(x, self.ref[name], self.eager[name], floor=5e-5 * (name == "lse"), **rule)


# How the emulator says what a flaw has led to.
CAUGHT = {
    "copy in flight": r"a copy that no wait_copies\(\) has landed",
    "race": "a race",
    "address": "outside every tensor|outside shared memory|past shared memory",
    "unwritten": "no kernel has written",
    "cluster": "may not have begun|the block ends and|has no block",
}


def hunt(all_runs: Sequence[Run]) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Plants each flaw that a run could have in turn: those that no run notices, and how often
    what caught which."""
    survivors: list[str] = []
    how: Counter[tuple[str, str]] = Counter()
    try:
        emulated.watch()
        assert not any(run.how_it_fails() for run in all_runs)
        for i, flaw in enumerate(emulated.flaws()):
            emulated.plant(i)
            emulated.seed(i)
            kernel = flaw.partition(":")[0]
            caught = (run.how_it_fails() for run in all_runs if kernel in run.kernels)
            by = next(filter(None, caught), "")
            how[flaw.partition(",")[0], by] += 1
            if not by:
                survivors.append(flaw)
    finally:
        emulated.plant()
        emulated.device()
    print(*(f"{n:3} × {flaw} → {by}" for (flaw, by), n in sorted(how.items())), sep="\n")
    return survivors, how


def runs(head_dim: int, memory: int) -> list[Run]:
    """Each kind of tile in one of them; columns past D and Dv that have to be zeros."""
    dtype = torch.bfloat16 if memory == LARGE else torch.float16
    common = {"batch": 1, "heads": 1, "dim": head_dim - 8, "dim_v": head_dim - 16, "dtype": dtype,
              "grads": ("out", "lse")}  # fmt: skip
    cases = [
        AttentionCase(**common, seq_q=40, seq_k=70, causal=True),
        AttentionCase(**common, seq_q=70, seq_k=200, causal=True),
        AttentionCase(**common, seq_q=150, seq_k=10, causal=True),  # queries that see nothing
        AttentionCase(**common, seq_q=10, seq_k=150, causal="top_left"),  # keys not seen
    ]
    # The kernel of the deterministic dQ has one shape for all sizes of memory.
    kinds = ("forward", "atomics", "deterministic")[: 3 if memory == LARGE else 2]
    found = [Run(case, kind) for case in cases for kind in kinds]
    # Keys split between blocks.
    found.append(Run(AttentionCase(**common, seq_q=10, seq_k=520, causal=True), "forward"))
    if dtype == torch.float16:
        # ds as large as its bound: with a smaller norm of these rows, of which the first lane of a
        # team has nothing, it would overflow.
        case = AttentionCase(**common, seq_q=10, causal="top_left", scale=0.002)
        made = case.inputs()
        sign = made["v"][..., 0, :].sign() * (torch.arange(head_dim - 16) % 64 >= 8)
        made["v"][..., 0, :], made["v"][..., 1, :] = 300 * sign, -300 * sign
        made["dout"][..., 1, :] = 100 * sign
        found.append(Run(case, "atomics", made))
    return found


def runs_with_options(head_dim: int) -> list[Run]:
    """Of the kernels that take every option; each way in which a bias is broadcast."""
    common = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": head_dim - 8, "dim_v": head_dim - 16,
              "dtype": torch.bfloat16, "grads": ("out", "lse")}  # fmt: skip
    every = {"window": (70, 9), "alibi_slopes": (2,), "sinks": True, "dropout_p": 0.3}
    cases = [  # the cheapest first
        AttentionCase(**common, seq_q=20, seq_k=70, bias=(1, 2, 20, 1)),
        AttentionCase(**common, seq_q=20, seq_k=70, bias=(1, 1, 1, 1)),
        AttentionCase(**common, seq_q=70, seq_k=40, bias=(1, 1, 1, 40), window=(5, 30)),
        AttentionCase(**common, seq_q=20, seq_k=192, causal=True, window=(3, 0), alibi_slopes=(2,)),
        AttentionCase(**common, seq_q=150, seq_k=10, causal=True, window=(3, 0)),
        AttentionCase(
            **common, seq_q=140, seq_k=70, causal="top_left", window=(3, 0), bias=(1, 2, 140, 70)
        ),
        AttentionCase(**common, **every, seq_q=70, seq_k=190, bias=(1, 1, 70, 190)),
    ]
    found = [Run(case, kind) for case in cases for kind in ("forward", "atomics", "deterministic")]
    split = AttentionCase(**common, seq_q=3, seq_k=520, bias=(1, 2, 3, 520), sinks=True)
    return [*found, Run(split, "forward")]


@pytest.mark.slow
def test_every_flaw_with_options_is_caught() -> None:
    survivors, how = hunt(runs_with_options(64))
    assert not survivors
    kinds = [*ALWAYS, *COPIES, "late begin", "bound too high", "bound too low"]
    assert {flaw for flaw, by in how if by} >= {f"attention_backward_bias: {x}" for x in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("memory", [LARGE, LITTLE], ids=["large", "little"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_every_flaw_is_caught(head_dim: int, memory: int) -> None:
    emulated.device(max_shared_bytes=memory)
    survivors, how = hunt(runs(head_dim, memory))
    assert not survivors
    for kernel, kinds in expected(memory).items():
        assert {flaw for flaw, by in how if by} >= {f"{kernel}: {kind}" for kind in kinds}


COPIES = ["wrong swizzle", "no wait", "wait for one less", "no commit", "no zeros", "copies anyway"]
ALWAYS = ["no barrier", "next place"]


def expected(memory: int) -> dict[str, list[str]]:
    """By kernel, the flaws of which it has one at least."""
    kernels = {
        "attention_forward": [*ALWAYS, *COPIES, "early end", "late full"],
        "attention_combine": ["bound too high", "bound too low"],
        "attention_backward_keys": [*ALWAYS, *COPIES, "no atomic"],
        "attention_backward_round": ALWAYS,
    }
    if memory == LARGE:
        kernels["attention_backward_queries"] = [*ALWAYS, *COPIES]
    else:
        kernels["attention_backward_norms"] = ["no shuffle", "no atomic"]
    return kernels


@pytest.mark.slow
def test_no_wait_and_no_barrier_goes_unwatched() -> None:
    """Each line of the kernels that waits, meets or asks for its tiles is a place of a flaw."""
    watched = set()
    try:
        for memory in (LARGE, LITTLE):
            emulated.device(max_shared_bytes=memory)
            for head_dim in (64, 128, 256):
                small = [run for run in runs(head_dim, memory) if run.case.seq_q == 40]
                if head_dim == 64 and memory == LARGE:
                    small += [run for run in runs_with_options(64) if run.case.seq_q == 20]
                emulated.watch()
                for run in small:
                    run.compute()
                watched |= {re.search(r"\S+:\d+", flaw)[0] for flaw in emulated.flaws()}
    finally:
        emulated.plant()
        emulated.device()
    words = re.compile(
        r"\b((sync_block|sync_warp|wait_copies<.*>|commit_copies)\(\);|(key|query)_tiles\()"
    )
    found = {
        f"{path.name}:{i}"
        for path in (SOURCES / "sm80").glob("*.cuh")
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line.partition("//")[0])
    }
    assert len(found) >= 15
    assert found - watched == set()
