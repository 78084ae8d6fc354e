"""Compiles what a GPU's grids need in many processes at once: python -m fusedattn.benchmarks.ahead.

Triton and Inductor keep what they have compiled on disk; the process that measures, which works
through the cases one by one, finds it there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from . import attention_cases, rowwise_cases, rowwise_peers
from .run import ATTENTION, ROWWISE
from .versions import OURS, called_once

PARTS = {"attention": ATTENTION, "rowwise": ROWWISE}
Job = tuple[str, Any, str]  # "attention" or "rowwise", one of its cases, the name of a version


def jobs(device: torch.device) -> list[Job]:
    """Every version of the GPU's grids that is compiled, what is slow and shared first.

    Our Triton kernels are the same for all lengths but where the batch is one.
    """
    cells = attention_cases.gpu_grid(device)
    ends = [case for case in cells if case.seq_q in (2048, 16384)]
    # With the backward pass the forward is compiled too.
    ends.sort(key=lambda case: not case.backward)
    rows = rowwise_cases.full_grid(device)
    compiled = [case for case in rows if rowwise_peers.worth_compiling(case, device)]
    return [
        *(("attention", case, f"{OURS}-triton") for case in ends),
        *(("attention", case, "flex") for case in cells if case.regime == "self-attention"),
        *(("rowwise", case, f"{OURS}-triton") for case in rows),
        *(("rowwise", case, rowwise_peers.COMPILED) for case in compiled),
    ]


def prepare(part: str, case: Any, name: str, device: torch.device) -> str:
    """Build one version of a case and call it once; says how long that took, or why not."""
    start = time.perf_counter()
    try:
        kind = PARTS[part]
        build = kind.builders(device, [] if name.startswith(OURS) else [name])[name]
        called_once(build(kind.problem(case, device, seed=0)))
        outcome = f"{time.perf_counter() - start:.1f} s"
    except Exception as error:
        outcome = (str(error) or type(error).__name__).splitlines()[0][:100]
    return f"{case.label}, {name}: {outcome}"


def prepare_all(chosen: Sequence[Job], device: torch.device, pool: Executor) -> list[str]:
    """The jobs in the pool, begun in this order; prints what each says."""
    told = []
    begun = [pool.submit(prepare, *job, device) for job in chosen]
    for job in as_completed(begun):
        told.append(job.result())
        print(told[-1], flush=True)
    return told


def main() -> int:
    """Prepare the GPU's grids, on all cores but a few; returns the exit status."""
    if not torch.cuda.is_available():
        print("torch finds no GPU here, so there is nothing to compile for", file=sys.stderr)
        return 2
    # Inductor would start a process for each core in each process.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    workers = max(1, (os.cpu_count() or 1) - 3)
    device = torch.device("cuda")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        prepare_all(jobs(device), device, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
