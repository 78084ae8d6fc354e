"""Sinusoidal positions' kernels for GPUs: interpreted, emulated, or on a GPU."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from cases import BF16
from cases.position import (
    LAYOUTS,
    SINUSOIDAL,
    SinusoidalCase,
    check_sinusoidal,
    launch_sinusoidal,
    relayout,
    ulps_of_encoding,
)  # fmt: skip
from compare import device_for, far_apart
from fusedattn.ops import sinusoidal
from fusedattn.ops.sinusoidal import SinusoidalCall, SinusoidalConfig
from packaging.version import Version

pytestmark = [
    pytest.mark.backends("triton", "cuda_emulated", "cuda"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def ulps(backend: str) -> float:
    """At most, of the encoding."""
    rounds_twice = backend == "triton" and not torch.cuda.is_available()
    return 2.5 if rounds_twice and Version(version("triton")) < Version("3.9") else 1.5


@pytest.mark.backends("fast", "triton", "cuda_emulated", "cuda")
@pytest.mark.parametrize("case", SINUSOIDAL.values(), ids=SINUSOIDAL)
def test_regimes(backend: str, case: SinusoidalCase) -> None:
    check_sinusoidal(backend=backend, **case.inputs())


@pytest.mark.parametrize("width", [64, 31])
@pytest.mark.parametrize("offset", [0, 999_950])
def test_the_encoding_is_exact_to_an_ulp(backend: str, offset: int, width: int) -> None:
    assert ulps_of_encoding(width, backend, offset=offset).max() <= ulps(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_and_written_in_place(backend: str, layout: str) -> None:
    x = SinusoidalCase(dtype=BF16).inputs(device_for(backend))["x"]
    config = SinusoidalConfig(10000.0, 0.5, 3)
    empty = torch.full_like(x, torch.nan)
    want = launch_sinusoidal(x, empty.clone(), backend, config)
    moved, out = relayout(x, layout), relayout(empty, layout)
    assert torch.equal(launch_sinusoidal(moved, out, backend, config), want)


def test_each_batch_has_its_own_positions(backend: str) -> None:
    """The same as one call for each."""
    made = SinusoidalCase(batch=3, positions="own").inputs(device_for(backend))
    kernels = sinusoidal.op.kernels(backend)
    x, positions, config = made["x"], made["positions"], SinusoidalConfig()
    out = torch.full_like(x, torch.nan)
    kernels.forward(SinusoidalCall(x, positions, None, config), out)
    for i in range(3):
        one = torch.full_like(x[i : i + 1], torch.nan)
        call = SinusoidalCall(x[i : i + 1], positions[i : i + 1], None, config)
        kernels.forward(call, one)
        assert torch.equal(out[i : i + 1], one)


@pytest.mark.slow
@pytest.mark.backends("triton", "cuda")
def test_at_offsets_past_two_billion_elements(backend: str) -> None:
    case = SinusoidalCase(batch=1, seq=5, dtype=BF16)
    x = case.inputs(device_for(backend))["x"]
    config, empty = SinusoidalConfig(), torch.full_like(x, torch.nan)
    want = launch_sinusoidal(x, empty, backend, config)
    far, out = (far_apart(y, 2**29) for y in (x, torch.full_like(x, torch.nan)))
    assert torch.equal(launch_sinusoidal(far, out, backend, config), want)
