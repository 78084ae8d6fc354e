"""Rotary's kernels for GPUs: interpreted, emulated, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import BF16
from cases.position import LAYOUTS, ROTARY, RotaryCase, launch_rotary, relayout
from compare import device_for, far_apart
from fusedattn.ops.rotary_config import RotaryConfig

pytestmark = [
    pytest.mark.backends("triton", "cuda_emulated", "cuda"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.mark.backends("fast", "triton", "cuda_emulated", "cuda")
@pytest.mark.parametrize("case", ROTARY.values(), ids=ROTARY)
def test_regimes(backend: str, case: RotaryCase) -> None:
    case.check(backend)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_and_written_in_place(
    backend: str, layout: str, interleaved: bool
) -> None:
    case = RotaryCase(heads2=2, rotated=16, dtype=BF16, positions="own", batched=True)
    made = case.inputs(device_for(backend))
    config = RotaryConfig(interleaved)
    want = launch_rotary(made, backend, config)
    moved = made | {name: relayout(made[name], layout) for name in ("x", "x2")}
    outputs = {
        name: relayout(torch.full_like(like, torch.nan), layout)
        for name, like in zip(("out", "out2"), want, strict=True)
    }
    launch_rotary(moved, backend, config, **outputs)
    assert torch.equal(outputs["out"], want[0])
    assert torch.equal(outputs["out2"], want[1])
    moved |= {name: relayout(made[name], layout) for name in ("cos", "sin")}
    wide = made["positions"].new_full((2, 2 * case.seq), -(2**40))
    wide[:, ::2] = made["positions"]
    moved["positions"] = wide[:, ::2]
    launch_rotary(moved, backend, config, **outputs)
    assert torch.equal(outputs["out"], want[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotated", [32, 16, 6])
def test_out_may_be_x(backend: str, rotated: int, interleaved: bool) -> None:
    made = RotaryCase(heads2=2, rotated=rotated).inputs(device_for(backend))
    config = RotaryConfig(interleaved)
    want = launch_rotary(made, backend, config)
    launch_rotary(made, backend, config, out=made["x"], out2=made["x2"])
    assert torch.equal(made["x"], want[0])
    assert torch.equal(made["x2"], want[1])


def test_an_expanded_x(backend: str) -> None:
    made = RotaryCase().inputs(device_for(backend))
    one = made["x"][:, :1].expand(-1, 3, -1, -1)
    got, _ = launch_rotary(made | {"x": one}, backend, RotaryConfig())
    want, _ = launch_rotary(made | {"x": one.contiguous()}, backend, RotaryConfig())
    assert torch.equal(got, want)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("where", [-1, 24, 2**31 + 1, -(2**40)])
def test_a_position_without_a_row(backend: str, where: int, interleaved: bool) -> None:
    """NaN in what has no angle, nothing elsewhere, and nothing outside the tables is read."""
    case = RotaryCase(positions="own", rotated=16)
    made = case.inputs(device_for(backend))
    config = RotaryConfig(interleaved)
    want, _ = launch_rotary(made, backend, config)
    made["positions"][1, 5] = where
    got, _ = launch_rotary(made, backend, config)
    assert got[1, :, 5, :16].isnan().all()
    got[1, :, 5, :16] = want[1, :, 5, :16]
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.backends("triton", "cuda")
def test_at_offsets_past_two_billion_elements(backend: str) -> None:
    case = RotaryCase(batch=1, heads=1, seq=5, heads2=1, dtype=BF16)
    made = case.inputs(device_for(backend))
    want = launch_rotary(made, backend, RotaryConfig())
    far = far_apart(made["x2"], 2**29)
    _, got = launch_rotary(made | {"x2": far}, backend, RotaryConfig())
    assert torch.equal(got, want[1])
    launch_rotary(made, backend, RotaryConfig(), out2=far)
    assert torch.equal(far, want[1])
