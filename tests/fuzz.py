"""Many more random calls of attention than the suite has time for, held to the same rule.

    python tests/fuzz.py cpu avx2 --examples 5000 --seed 1
    python tests/fuzz.py triton --examples 500        (under its interpreter, without a GPU)
    python tests/fuzz.py cuda_emulated --examples 500

Prints how many were held to the rule, with which seed; the first that breaks it is made as small as
it gets, printed, and the script fails.
"""

from __future__ import annotations

import argparse
import time

import conftest  # noqa: F401  Triton's interpreter, threads
import hypothesis
import torch
from cases.drawn import drawn_cases
from cases.rules import RuleCase, check_rules
from fusedattn import _native
from hypothesis import strategies as st

HALVES = (torch.float16, torch.bfloat16)
PACKS = st.sampled_from((8, 16, 24, 40, 64, 72, 128))
STRATEGIES = {
    "cpu": drawn_cases(),
    "triton": drawn_cases(
        dtypes=(*HALVES, torch.float32), edges=(33, 65, 70), most=40, each=2,
        dims=st.integers(1, 40),
    ),
    "cuda_emulated": drawn_cases(
        dtypes=HALVES, edges=(65, 129, 130), most=70, each=2, dims=PACKS, ruled=False
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=STRATEGIES)
    parser.add_argument("instruction_set", nargs="?", help="of the CPU; its best by default")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.instruction_set:
        _native.cpu.select_instruction_set(given.instruction_set)
    count, begun = 0, time.perf_counter()

    @hypothesis.seed(given.seed)
    @hypothesis.settings(
        max_examples=given.examples, deadline=None, derandomize=False, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=STRATEGIES[given.backend])
    def hold(case: RuleCase) -> None:
        nonlocal count
        check_rules(case, given.backend, slack=2)
        count += 1

    hold()
    name = " ".join(filter(None, (given.backend, given.instruction_set)))
    seconds = time.perf_counter() - begun
    print(f"{name}: {count} calls within the rule, seed {given.seed}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
