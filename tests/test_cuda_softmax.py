# ruff: noqa: F811 (the fixture `backend` is imported)
"""Softmax in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from compare import check
from fusedattn import _native
from fusedattn.reference import functional as reference
from softmax_cases import FAR_SCALES, check_far_scores
from test_cuda_rowwise import BF16, DTYPES, F16, F32, LITTLE, backend, normal, set_device  # noqa: F401
from torch import Tensor


def softmax_results(made: dict, dout: Tensor, function, dtype=None, **options) -> dict:
    leaves = {
        name: made[name].detach().to(dtype or made[name].dtype).requires_grad_()
        for name in ("x", "bias")
        if name in made
    }
    out = function(leaves["x"], mask=made.get("mask"), bias=leaves.get("bias"), **options)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check_softmax(backend: str, made: dict, **options) -> dict:
    dtype, shape = made["x"].dtype, made["x"].shape
    dout = normal(backend, *shape, dtype=dtype)
    actual = softmax_results(made, dout, fusedattn.softmax, backend=backend, **options)
    ref = softmax_results(made, dout, reference.softmax, torch.float64, **options)
    eager = softmax_results(made, dout, reference.softmax, dtype, **options)
    rows = made["x"].numel() // made["bias"].numel() if "bias" in made else 1
    case = f"{backend} {tuple(shape)} {options}"
    for name, value in actual.items():
        check(
            value, ref[name], eager[name], what=name, case=case, gradient=name != "out",
            tested=dtype, rows=rows if name == "dbias" else 1,
        )  # fmt: skip
    return actual


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((9, 8), id="one_thread"),
        pytest.param((2, 3, 5, 64), id="part_of_a_warp"),
        pytest.param((7, 512), id="a_warp"),
        pytest.param((5, 1504), id="several_warps"),
        pytest.param((1, 8192), id="a_block"),
        pytest.param((3, 1), id="width_1"),
        pytest.param((4, 33), id="single_elements"),
        pytest.param((2, 999), id="single_elements_several_warps"),
    ],
)
def test_softmax_widths(backend: str, shape: tuple, dtype: torch.dtype, seed: int) -> None:
    if backend == "cuda_emulated":
        _native.cuda_emulated().seed(seed)
    check_softmax(backend, {"x": 5 * normal(backend, *shape, dtype=dtype)}, scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", FAR_SCALES)
def test_scores_far_from_zero(backend: str, scale: float, dtype: torch.dtype) -> None:
    for width in (3, 100, 8200, 16400):
        check_far_scores(backend, width, scale, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shared", [LITTLE, 227 * 1024], ids=["read_again", "kept"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "masked_biased_causal"])
@pytest.mark.parametrize(("width", "dtype"), [(8200, F32), (16400, BF16), (12299, F16)])
def test_softmax_wide(
    backend: str, width: int, dtype: torch.dtype, extras: bool, shared: int, capability: int
) -> None:
    set_device(backend, capability=capability, max_shared_bytes=shared)
    made = {"x": normal(backend, 2, width, dtype=dtype)}
    if extras:
        made["bias"] = normal(backend, 1, width, dtype=dtype)
        made["mask"] = normal(backend, 2, width) > -0.5
    check_softmax(backend, made, causal=extras)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("width", [37, 40])
@pytest.mark.parametrize(
    ("mask", "bias"),
    [((2, 1, 1, -1), None), ((5, 1), (3, 5, -1)), (None, (1, 1, 5, 1)), ((2, 3, 5, -1), (-1,))],
    ids=str,
)
def test_softmax_extras(
    backend: str, mask: tuple | None, bias: tuple | None, width: int, causal: bool | str
) -> None:
    """Broadcast masks and biases, biases of another dtype, and rows with nothing to see."""
    dtype = BF16 if causal else F32
    made = {"x": normal(backend, 2, 3, 5, width, dtype=dtype)}
    if mask is not None:
        made["mask"] = normal(backend, *(width if n < 0 else n for n in mask)) > 0
        made["mask"][..., :1, :] = False
    if bias is not None:
        shape = [width if n < 0 else n for n in bias]
        made["bias"] = normal(backend, *shape, dtype=BF16).to(F32 if causal is True else dtype)
    actual = check_softmax(backend, made, causal=causal)
    if mask is not None:
        hidden = ~made["mask"].expand(2, 3, 5, width)
        assert torch.equal(actual["out"][hidden], torch.zeros_like(actual["out"][hidden]))


def test_softmax_layouts(backend: str) -> None:
    """Any strides, any dimension; a slice of a wider row at an odd address."""
    x = normal(backend, 2, 3, 16, 20)
    plain = fusedattn.softmax(x, backend=backend)
    assert torch.equal(fusedattn.softmax(x.transpose(1, 2), backend=backend), plain.transpose(1, 2))
    for dim in range(3):
        check_softmax(backend, {"x": x}, dim=dim)
    sliced = torch.zeros(2, 3, 16, 25, device=x.device)[..., 1:21].copy_(x)
    torch.testing.assert_close(fusedattn.softmax(sliced, backend=backend), plain, rtol=2e-6, atol=0)
    expanded = x[:1, :, :1].expand(2, 3, 16, 20)
    check_softmax(backend, {"x": expanded})


def test_softmax_nonfinite(backend: str) -> None:
    """A NaN or +∞ makes its own row NaN; large numbers cost no accuracy."""
    x = normal(backend, 4, 64)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, x[2] + 3e4
    out = fusedattn.softmax(x, backend=backend)
    ref = reference.softmax(x.double())
    assert out[:2].isnan().all()
    check(out[2:], ref[2:], reference.softmax(x)[2:], what="out")


def test_softmax_of_too_many_heads_is_refused() -> None:
    emulated = _native.cuda_emulated()
    if emulated is None:
        pytest.skip("needs setup.py build_emulator")
    many = torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    with pytest.raises(ValueError, match="got x with 2147483648 heads"):
        emulated.softmax_forward((many, None, None, -1, (0, 1.0)), many)
