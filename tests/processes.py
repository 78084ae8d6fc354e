"""Tests that need a process of their own: imports, forks, memory, crashes, compilers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each package and its folder.
SHIPPED = {"fusedattn": "python/fusedattn", "fusedattn/kernels": "kernels",
           "fusedattn/benchmarks": "benchmarks"}  # fmt: skip

# Seconds for builds and compilers: several times what they take on two slow, shared cores.
PATIENCE = 1800

# For which GPUs the suite compiles kernels to look at their machine code; "none" for none.
ARCHITECTURES = re.findall(r"\d+[af]?", os.environ.get("FUSEDATTN_CUDA_ARCHS", "90a"))


def wanted(targets: Iterable[str]) -> list[str]:
    """Those of Triton's targets (sm_90) that ARCHITECTURES name."""
    names = {f"sm_{each.rstrip('af')}" for each in ARCHITECTURES}
    return [each for each in targets if each in names]


def in_a_new_process(code: str) -> str:
    """What `code` prints, run by a new interpreter.

    Raises:
        AssertionError: the interpreter failed or crashed; with what it wrote to stderr.
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()
