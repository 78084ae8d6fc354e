"""Rotary's and sinusoidal positions' Triton kernels, interpreted where there is no GPU."""

from __future__ import annotations

import position_cases as cases
import pytest
import torch
from compare import far_apart
from fusedattn.ops.rotary_config import RotaryConfig
from fusedattn.ops.sinusoidal import SinusoidalConfig
from packaging.version import Version
from position_kernels import RotaryTests, SinusoidalTests

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


class TestRotary(RotaryTests):
    backend = "triton"


class TestSinusoidal(SinusoidalTests):
    backend = "triton"
    if not torch.cuda.is_available() and Version(triton.__version__) < Version("3.9"):
        ulps = 2.5  # interpreters before rounded a fused multiply-add twice


BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary_at_offsets_past_two_billion_elements(backend: str) -> None:
    case = cases.RotaryCase(batch=1, heads=1, seq=5, heads2=1, dtype=torch.bfloat16)
    made = case.inputs(cases.device_for(backend))
    want = cases.launch_rotary(made, backend, RotaryConfig())
    far = far_apart(made["x2"], 2**29)
    _, got = cases.launch_rotary(made | {"x2": far}, backend, RotaryConfig())
    assert torch.equal(got, want[1])
    cases.launch_rotary(made, backend, RotaryConfig(), out2=far)
    assert torch.equal(far, want[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinusoidal_at_offsets_past_two_billion_elements(backend: str) -> None:
    case = cases.SinusoidalCase(batch=1, seq=5, dtype=torch.bfloat16)
    x = case.inputs(cases.device_for(backend))["x"]
    config, empty = SinusoidalConfig(), torch.full_like(x, torch.nan)
    want = cases.launch_sinusoidal(x, empty, backend, config)
    far, out = (far_apart(y, 2**29) for y in (x, torch.full_like(x, torch.nan)))
    assert torch.equal(cases.launch_sinusoidal(far, out, backend, config), want)
