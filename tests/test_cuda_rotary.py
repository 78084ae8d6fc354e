"""Rotary's and sinusoidal positions' CUDA kernels: emulated here, on a GPU where there is one."""

from __future__ import annotations

import pytest
from fusedattn import _native
from position_kernels import RotaryTests, SinusoidalTests

emulated = _native.cuda_emulated()


class Emulated:
    """Each test runs in three random orders of the threads."""

    backend = "cuda_emulated"

    @pytest.fixture(autouse=True, params=range(3))
    def order(self, request: pytest.FixtureRequest) -> None:
        if emulated is None:
            pytest.skip("needs python setup.py build_emulator")
        emulated.seed(request.param)


class TestRotaryEmulated(Emulated, RotaryTests):
    pass


class TestSinusoidalEmulated(Emulated, SinusoidalTests):
    pass


@pytest.mark.gpu
class TestRotary(RotaryTests):
    backend = "cuda"


@pytest.mark.gpu
class TestSinusoidal(SinusoidalTests):
    backend = "cuda"
