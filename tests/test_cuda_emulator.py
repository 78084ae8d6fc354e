"""The emulator that runs the CUDA kernels here: right kernels pass, each planted flaw is caught."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from fusedattn import _native

emulated = _native.cuda_emulated()
if emulated is None:
    pytest.skip("needs python setup.py build_emulator", allow_module_level=True)


def run(kernel: str, flaw: str = "none", rows: int = 6, width: int = 64) -> torch.Tensor:
    """A kernel of csrc/cuda/emulator/tests on random numbers; its output."""
    x = torch.randn(rows, width)
    out = torch.full_like(x, 7.0)
    emulated.planted(kernel, x, out, flaw)
    return out


@pytest.fixture(params=range(20))
def seed(request: pytest.FixtureRequest) -> int:
    emulated.seed(request.param)
    return request.param
