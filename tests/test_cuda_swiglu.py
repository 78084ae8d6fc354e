# ruff: noqa: F811 (the fixture `backend` is imported)
"""SwiGLU and its kin in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from fusedattn import _native
from swiglu_cases import ACTIVATIONS, WIDTHS, check_extremes, check_swiglu, inputs, results
from test_cuda_rowwise import DTYPES, backend, normal  # noqa: F401


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [False, True])
def test_swiglu_widths(backend: str, joined: bool, dtype: torch.dtype, seed: int) -> None:
    if backend == "cuda_emulated":
        _native.cuda_emulated().seed(seed)
    for i, width in enumerate(WIDTHS):
        made = inputs(3, width, dtype=dtype, joined=joined)
        check_swiglu(backend, made, ACTIVATIONS[(i + seed) % 4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu_without_limit(backend: str, activation: str, dtype: torch.dtype) -> None:
    check_extremes(backend, dtype, activation)


@pytest.mark.parametrize("apart", [1, 8])
def test_swiglu_rows_that_lie_apart(backend: str, apart: int) -> None:
    """Heads inside rows, so that nothing merges; with 8 columns between rows still in packs."""
    tensors = {name: normal(backend, 2, 3, 4, 48) for name in ("gate", "up", "dout")}
    want = results(fusedattn.swiglu, tensors, torch.float32, backend=backend)
    wide = {name: torch.cat((x, x[..., :apart]), -1) for name, x in tensors.items()}
    inside = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in wide.items()}
    moved = {name: x[..., :48] for name, x in inside.items()}
    found = results(fusedattn.swiglu, moved, torch.float32, backend=backend)
    for name, x in want.items():
        assert torch.equal(found[name], x)
