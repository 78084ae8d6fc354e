"""Rotary's and sinusoidal positions' Triton kernels, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
from position_kernels import RotaryTests, SinusoidalTests

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


class TestRotary(RotaryTests):
    backend = "triton"


class TestSinusoidal(SinusoidalTests):
    backend = "triton"
