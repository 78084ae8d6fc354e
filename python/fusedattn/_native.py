"""The native modules, or why they are missing. Torch comes first: its OpenMP runtime is theirs."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # noqa: F401

REMEDY = "reinstall fusedattn where a C++20 compiler is found (`fusedattn env` says more)"

cpu: Any = None
cpu_error: str | None = None
try:
    cpu = importlib.import_module("fusedattn._cpu")
except ImportError as error:
    cpu_error = str(error)
