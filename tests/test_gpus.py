"""Which backend serves attention on which GPU, and why not another: settled without one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import fusedattn
import pytest
import torch
from fusedattn import _native
from fusedattn.ops import _backends
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch):
    """explained(capability, …): what is said of a call on such a GPU, with CUDA's module built."""

    def explain(capability: int, dtype=torch.bfloat16, backward=False, versions=(13000, 13000)):
        built = SimpleNamespace(
            runs_on=lambda each: each >= 80, architectures=lambda: [80], versions=lambda: versions
        )
        monkeypatch.setattr(_native, "cuda", built)
        monkeypatch.setattr(_backends, "_mismatch", inspect.unwrap(_backends._mismatch))
        monkeypatch.setattr(_backends, "_capability", lambda index: capability)
        with FakeTensorMode():
            x = torch.empty(1, 2, 64, 64, dtype=dtype, device="cuda")
            if not backward:
                return fusedattn.explain(fusedattn.attention, x, x, x)
            lse = torch.empty(1, 2, 64, device="cuda")
            op = torch.ops.fusedattn.attention_bwd
            return fusedattn.explain(lambda: op(x, None, x, lse, x, x, x))

    return explain


@pytest.mark.parametrize(
    ("capability", "forward"), [(80, "cuda"), (86, "cuda"), (89, "cuda"), (90, "triton"),
                                (100, "triton"), (103, "triton"), (120, "cuda")]
)  # fmt: skip
def test_each_direction_goes_where_it_is_faster(capability, forward, explained):
    assert explained(capability).startswith(f"attention: {forward}")
    assert explained(capability, backward=True).splitlines()[0].endswith(": cuda")
    if forward == "triton":
        assert 'ask for it with backend="cuda"' in explained(capability)


def test_what_triton_does_not_take_stays_with_cuda(explained, monkeypatch):
    monkeypatch.setattr(_backends, "HAS_TRITON", False)
    assert explained(90).startswith("attention: cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_tensor_cores_is_refused(dtype, explained):
    said = explained(75, dtype)
    assert said.startswith("attention: reference")
    assert f"sm_75 multiplies {dtype} without tensor cores" in said
    assert explained(75, torch.float32).startswith("attention: triton")


@pytest.mark.parametrize(
    ("name", "served"), [("gfx942", "triton"), ("gfx90a", "triton"), ("gfx1100", "reference")]
)
def test_gpus_of_amd(name, served, explained, monkeypatch):
    properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert explained(0).startswith(f"attention: {served}")


@pytest.mark.parametrize(
    ("versions", "served"),
    [((13000, 12080), "triton"), ((13000, 0), "triton"), ((13020, 13000), "cuda")],
)
def test_a_driver_older_than_the_runtime(versions, served, explained):
    said = explained(80, versions=versions)
    assert said.startswith(f"attention: {served}")
    if versions[1] == 12080:
        assert "built by CUDA 13.0, the driver knows 12.8" in said


def test_a_device_that_is_no_gpu_of_theirs():
    with FakeTensorMode():
        x = torch.empty(1, 2, 64, 64, device="xpu")
        said = fusedattn.explain(fusedattn.attention, x, x, x)
    assert "  cpu: tensors are on xpu; " in said
    assert said.startswith("attention: reference")
