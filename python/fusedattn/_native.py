"""The native modules, or why they are missing. Torch comes first: its OpenMP runtime is theirs."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # noqa: F401

REMEDY = (
    "install GCC and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev; Fedora: "
    "dnf install gcc-c++ python3-devel), then repeat the installation of fusedattn with "
    "--no-cache-dir --force-reinstall --no-deps"
)

cpu: Any = None
cpu_error: str | None = None
try:
    cpu = importlib.import_module("fusedattn._cpu")
except ImportError as error:
    cpu_error = str(error)
