"""Norms in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, HALF_AND_SINGLE
from cases.norm import NormCase, check_norm, results
from compare import device_for
from fusedattn import _native

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")
# Less shared memory than wide rows need: they go to clusters or are read again.
LITTLE = 40 * 1024


def set_device(backend: str, **device: int) -> None:
    """What the emulated GPU has; a real one has what it has."""
    if backend == "cuda_emulated":
        _native.cuda_emulated().device(**device)


SHAPES = {
    "one_thread": (9, 8), "part_of_a_warp": (37, 64), "a_warp": (7, 512),
    "several_warps": (5, 1504), "a_block": (1, 8192), "width_1": (3, 1), "single_elements": (4, 33),
    "single_elements_several_warps": (2, 999),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_widths(backend: str, shape: tuple, dtype: torch.dtype) -> None:
    check_norm(NormCase("layer_norm", shape, dtype=dtype, weight=dtype, bias=dtype), backend)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shared", [LITTLE, 227 * 1024], ids=["read_again", "kept"])
@pytest.mark.parametrize(
    ("width", "dtype"), [(8200, F32), (16400, BF16), (12299, F32), (16392, F16)]
)
def test_wide(backend: str, width: int, dtype: torch.dtype, shared: int, capability: int) -> None:
    set_device(backend, capability=capability, max_shared_bytes=shared)
    residual = F32 if dtype == F16 else None
    check_norm(NormCase(shape=(2, width), dtype=dtype, residual=residual), backend)


def layer(rows: int, width: int, dtype: torch.dtype = F32, **changes) -> NormCase:
    return NormCase("layer_norm", (rows, width), dtype=dtype, **changes)


def rms(rows: int, width: int, dtype: torch.dtype = F32, **changes) -> NormCase:
    return NormCase("rms_norm", (rows, width), dtype=dtype, **changes)


CASES = [
    rms(5, 64, weight_offset=1.0),
    rms(5, 264, BF16, weight=BF16),
    rms(3, 40, weight=None),
    layer(3, 40, BF16, weight=None, bias=BF16),
    layer(5, 264, BF16, bias=F16),
    layer(5, 264, F16),
    layer(5, 264, weight=BF16, bias=BF16),
    layer(5, 264, BF16, residual=BF16, dropout_p=0.3),
    layer(5, 264, BF16, residual=BF16, stream=F32),
    layer(5, 264, residual=BF16),
    layer(5, 264, F16, residual=F32, dropout_p=0.5),
    layer(5, 263, F16, residual=F32, dropout_p=0.5),
    layer(5, 264, residual=F32, grads=("out",)),
    layer(5, 264, residual=F32, grads=("z",)),
    layer(5, 37, residual=F32, grads=("z",)),
    layer(5, 64, dropout_p=0.5),
    layer(5, 64, residual=F32, dropout_p=1.0),
    layer(2, 8200, residual=F32, dropout_p=0.5),
    rms(3, 8200),
    # More rows than the threads of all blocks take at a time.
    layer(400, 64, residual=F32),
    layer(131, 520, BF16, weight=BF16, bias=BF16),
    # z in another half format than x: no kernel keeps its rows, so they are read twice.
    rms(5, 64, BF16, residual=F16, weight=BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(backend: str, case: NormCase) -> None:
    check_norm(case, backend)


def test_layouts(backend: str) -> None:
    """Rows at a distance, at an odd address, and one row for all: the same bits."""
    made = layer(6, 64).inputs(device_for(backend))
    x, weights = made["x"], (made["weight"], made["bias"])
    plain = fusedattn.layer_norm(x, 64, *weights, backend=backend)
    wide = torch.zeros(6, 80, device=plain.device)
    wide[:, :64] = x
    apart = fusedattn.layer_norm(wide[:, :64], 64, *weights, backend=backend)
    assert torch.equal(apart, plain)
    odd = torch.zeros(6 * 64 + 1, device=plain.device)[1:].view(6, 64).copy_(x)
    found = fusedattn.layer_norm(odd, 64, *weights, backend=backend)
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=2e-6)
    found = fusedattn.layer_norm(x[:1].expand(6, 64), 64, *weights, backend=backend)
    assert torch.equal(found, plain[:1].expand(6, 64))


@pytest.mark.parametrize("width", [256, 8200])
def test_far_from_zero(backend: str, width: int) -> None:
    """Rule 4: no cancellation where the mean is a thousand times the deviation."""
    check_norm(layer(3, width, mean=1000.0), backend, ill=True)


def test_runs_repeat(backend: str) -> None:
    """Sums over rows are added in a fixed order."""
    case = layer(300, 72, BF16)
    made = case.inputs(device_for(backend))
    first, second = (results(made, case, fusedattn, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("width", [72, 12000])
def test_without_a_gradient(backend: str, width: int) -> None:
    """Where no gradient will need them, the statistics are not kept."""
    set_device(backend, capability=90, max_shared_bytes=LITTLE)
    case = layer(3, width)
    made = case.inputs(device_for(backend))
    expected = results(made, case, fusedattn, backend=backend)
    x, weights = made["x"], (made["weight"], made["bias"])
    with torch.no_grad():
        out = fusedattn.layer_norm(x, width, *weights, **case.options, backend=backend)
    assert torch.equal(out, expected["out"])
