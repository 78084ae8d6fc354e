"""Tests that need a process of their own: imports, forks, memory, crashes, compilers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

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


# What it is, the call, and whether it is right.
Call = tuple[str, Callable[[], Any], bool]


def wrong_in_a_fork(calls: Callable[[], Iterable[Call]]) -> list[str]:
    """The right calls that are refused, and the wrong ones that are not or end the process.

    All run in one fork of this process, on one thread: OpenMP's others are not there.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12: there are other threads
        child = os.fork()
    if child == 0:
        os.close(read)
        try:
            torch.set_num_threads(1)
            with os.fdopen(write, "w", buffering=1) as pipe:
                for what, call, right in calls():
                    pipe.write(f"{what}\n")
                    try:
                        call()
                    except (TypeError, ValueError, RuntimeError, IndexError) as error:
                        if right:
                            pipe.write(f"  {what}: refused, {str(error).splitlines()[0]}\n")
                    else:
                        if not right:
                            pipe.write(f"  {what}: taken\n")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitpid(child, 0)[1]
    found = [line.strip() for line in lines if line.startswith("  ")]
    if status != 0:
        killed = os.WIFSIGNALED(status) and signal.Signals(os.WTERMSIG(status)).name
        found.append(f"{lines[-1]}: {killed or 'the child failed'}")
    return found
