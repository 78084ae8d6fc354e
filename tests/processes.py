"""Tests that need a process of their own: imports, forks, memory, crashes."""

from __future__ import annotations

import subprocess
import sys

# Seconds for builds and compilers: several times what they take on two slow, shared cores.
PATIENCE = 1800


def in_a_new_process(code: str) -> str:
    """What `code` prints, run by a new interpreter.

    Raises:
        AssertionError: the interpreter failed or crashed; with what it wrote to stderr.
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()
