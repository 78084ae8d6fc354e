"""SwiGLU and its kin in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases import F32, HALF_AND_SINGLE, Source
from cases.swiglu import ACTIVATIONS, WIDTHS, check_extremes, check_swiglu, inputs, results
from compare import device_for

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("joined", [False, True])
def test_widths(backend: str, joined: bool, activation: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        check_swiglu(backend, inputs(3, width, dtype=dtype, joined=joined), activation)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_limit(backend: str, activation: str, dtype: torch.dtype) -> None:
    check_extremes(backend, dtype, activation)


@pytest.mark.parametrize("apart", [1, 8])
def test_rows_that_lie_apart(backend: str, apart: int) -> None:
    """Heads inside rows, so that nothing merges; with 8 columns between rows still in packs."""
    tensors = {
        name: Source(device_for(backend)).normal(2, 3, 4, 48) for name in ("gate", "up", "dout")
    }
    want = results(fusedattn.swiglu, tensors, F32, backend=backend)
    wide = {name: torch.cat((x, x[..., :apart]), -1) for name, x in tensors.items()}
    inside = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in wide.items()}
    moved = {name: x[..., :48] for name, x in inside.items()}
    found = results(fusedattn.swiglu, moved, F32, backend=backend)
    for name, x in want.items():
        assert torch.equal(found[name], x)
