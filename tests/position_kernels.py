"""What every GPU backend's rotary and sinusoidal kernels are held to; a test file subclasses it."""

from __future__ import annotations

import position_cases as cases
import pytest
import torch
from fusedattn.ops.rotary_config import RotaryConfig
from fusedattn.ops.sinusoidal import SinusoidalConfig
from position_cases import BF16, RotaryCase, SinusoidalCase


class RotaryTests:
    backend: str

    @pytest.mark.parametrize("case", cases.ROTARY.values(), ids=cases.ROTARY)
    def test_regimes(self, case: RotaryCase) -> None:
        cases.check_rotary(case, self.backend)

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    def test_layouts_are_read_and_written_in_place(self, layout: str, interleaved: bool) -> None:
        case = RotaryCase(heads2=2, rotated=16, dtype=BF16, positions="own", batched=True)
        made = case.inputs(cases.device_for(self.backend))
        config = RotaryConfig(interleaved)
        want = cases.launch_rotary(made, self.backend, config)
        moved = made | {name: cases.relayout(made[name], layout) for name in ("x", "x2")}
        outputs = {
            name: cases.relayout(torch.full_like(like, torch.nan), layout)
            for name, like in zip(("out", "out2"), want, strict=True)
        }
        cases.launch_rotary(moved, self.backend, config, **outputs)
        assert torch.equal(outputs["out"], want[0])
        assert torch.equal(outputs["out2"], want[1])
        moved |= {name: cases.relayout(made[name], layout) for name in ("cos", "sin")}
        wide = made["positions"].new_full((2, 2 * case.seq), -(2**40))
        wide[:, ::2] = made["positions"]
        moved["positions"] = wide[:, ::2]
        cases.launch_rotary(moved, self.backend, config, **outputs)
        assert torch.equal(outputs["out"], want[0])

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize("rotated", [32, 16, 6])
    def test_out_may_be_x(self, rotated: int, interleaved: bool) -> None:
        made = RotaryCase(heads2=2, rotated=rotated).inputs(cases.device_for(self.backend))
        config = RotaryConfig(interleaved)
        want = cases.launch_rotary(made, self.backend, config)
        cases.launch_rotary(made, self.backend, config, out=made["x"], out2=made["x2"])
        assert torch.equal(made["x"], want[0])
        assert torch.equal(made["x2"], want[1])

    def test_an_expanded_x(self) -> None:
        made = RotaryCase().inputs(cases.device_for(self.backend))
        one = made["x"][:, :1].expand(-1, 3, -1, -1)
        got, _ = cases.launch_rotary(made | {"x": one}, self.backend, RotaryConfig())
        want, _ = cases.launch_rotary(made | {"x": one.contiguous()}, self.backend, RotaryConfig())
        assert torch.equal(got, want)

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize("where", [-1, 24, 2**31 + 1, -(2**40)])
    def test_a_position_without_a_row(self, where: int, interleaved: bool) -> None:
        """NaN in what has no angle, nothing elsewhere, and nothing outside the tables is read."""
        case = RotaryCase(positions="own", rotated=16)
        made = case.inputs(cases.device_for(self.backend))
        config = RotaryConfig(interleaved)
        want, _ = cases.launch_rotary(made, self.backend, config)
        made["positions"][1, 5] = where
        got, _ = cases.launch_rotary(made, self.backend, config)
        assert got[1, :, 5, :16].isnan().all()
        got[1, :, 5, :16] = want[1, :, 5, :16]
        assert torch.equal(got, want)


class SinusoidalTests:
    backend: str
    ulps = 1.5  # at most, of the encoding

    @pytest.mark.parametrize("case", cases.SINUSOIDAL.values(), ids=cases.SINUSOIDAL)
    def test_regimes(self, case: SinusoidalCase) -> None:
        cases.check_sinusoidal(case, self.backend)

    @pytest.mark.parametrize("width", [64, 31])
    @pytest.mark.parametrize("offset", [0, 999_950])
    def test_the_encoding_is_exact_to_an_ulp(self, offset: int, width: int) -> None:
        assert cases.ulps_of_encoding(width, self.backend, offset=offset).max() <= self.ulps

    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    def test_layouts_are_read_and_written_in_place(self, layout: str) -> None:
        x = SinusoidalCase(dtype=BF16).inputs(cases.device_for(self.backend))["x"]
        config = SinusoidalConfig(10000.0, 0.5, 3)
        empty = torch.full_like(x, torch.nan)
        want = cases.launch_sinusoidal(x, empty.clone(), self.backend, config)
        moved, out = cases.relayout(x, layout), cases.relayout(empty, layout)
        assert torch.equal(cases.launch_sinusoidal(moved, out, self.backend, config), want)

    def test_each_batch_has_its_own_positions(self) -> None:
        """The same as one call for each."""
        made = SinusoidalCase(batch=3, positions="own").inputs(cases.device_for(self.backend))
        kernels = cases.sinusoidal.op.kernels(self.backend)
        x, positions, config = made["x"], made["positions"], SinusoidalConfig()
        out = torch.full_like(x, torch.nan)
        kernels.forward(cases.SinusoidalCall(x, positions, None, config), out)
        for i in range(3):
            one = torch.full_like(x[i : i + 1], torch.nan)
            call = cases.SinusoidalCall(x[i : i + 1], positions[i : i + 1], None, config)
            kernels.forward(call, one)
            assert torch.equal(out[i : i + 1], one)
