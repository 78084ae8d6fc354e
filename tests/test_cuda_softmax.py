"""Softmax in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, HALF_AND_SINGLE, Source
from cases.softmax import FAR_SCALES, SoftmaxCase, check_far_scores, check_softmax
from compare import check, device_for
from fusedattn import _native
from fusedattn.reference import functional as reference
from test_cuda_rowwise import LITTLE, SHAPES, set_device

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 3, 5, 64)], ids=str)
def test_widths(backend: str, shape: tuple, dtype: torch.dtype) -> None:
    SoftmaxCase(shape, dtype, scale=0.7).check(backend)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("scale", FAR_SCALES)
def test_scores_far_from_zero(backend: str, scale: float, dtype: torch.dtype) -> None:
    for width in (3, 100, 8200, 16400):
        check_far_scores(backend, width, scale, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shared", [LITTLE, 227 * 1024], ids=["read_again", "kept"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "masked_biased_causal"])
@pytest.mark.parametrize(("width", "dtype"), [(8200, F32), (16400, BF16), (12299, F16)])
def test_wide(
    backend: str, width: int, dtype: torch.dtype, extras: bool, shared: int, capability: int
) -> None:
    set_device(backend, capability=capability, max_shared_bytes=shared)
    case = SoftmaxCase((2, width), dtype)
    if extras:
        case = SoftmaxCase((2, width), dtype, (2, width), (1, width), causal=True)
    case.check(backend)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("width", [37, 40])
@pytest.mark.parametrize(
    ("mask", "bias"),
    [((2, 1, 1, -1), None), ((5, 1), (3, 5, -1)), (None, (1, 1, 5, 1)), ((2, 3, 5, -1), (-1,))],
    ids=str,
)
def test_extras(
    backend: str, mask: tuple | None, bias: tuple | None, width: int, causal: bool | str
) -> None:
    """Broadcast masks and biases, biases of another dtype, and rows with nothing to see."""
    mask, bias = (x and tuple(width if n < 0 else n for n in x) for x in (mask, bias))
    dtype = BF16 if causal else F32
    case = SoftmaxCase(
        (2, 3, 5, width), dtype, mask, bias, F32 if causal is True else dtype, causal
    )
    made = case.inputs()
    if mask is not None:
        made["mask"][..., :1, :] = False
    found = check_softmax(backend=backend, **made, causal=causal)["out"].cpu()
    if mask is not None:
        hidden = ~made["mask"].expand(2, 3, 5, width)
        assert torch.equal(found[hidden], torch.zeros_like(found[hidden]))


def test_layouts(backend: str) -> None:
    """Any strides, any dimension; a slice of a wider row at an odd address."""
    x = Source(device_for(backend)).normal(2, 3, 16, 20)
    plain = fusedattn.softmax(x, backend=backend)
    assert torch.equal(fusedattn.softmax(x.transpose(1, 2), backend=backend), plain.transpose(1, 2))
    for dim in range(3):
        check_softmax(x.cpu(), backend, dim)
    sliced = torch.zeros(2, 3, 16, 25, device=x.device)[..., 1:21].copy_(x)
    torch.testing.assert_close(fusedattn.softmax(sliced, backend=backend), plain, rtol=2e-6, atol=0)
    check_softmax(x.cpu()[:1, :, :1].expand(2, 3, 16, 20), backend)


def test_nonfinite(backend: str) -> None:
    """A NaN or +∞ makes its own row NaN; large numbers cost no accuracy."""
    x = Source(device_for(backend)).normal(4, 64)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, x[2] + 3e4
    out = fusedattn.softmax(x, backend=backend)
    ref = reference.softmax(x.double())
    assert out[:2].isnan().all()
    check(out[2:], ref[2:], reference.softmax(x)[2:], what="out")


@pytest.mark.backends("cuda_emulated")
def test_too_many_heads_are_refused(backend: str) -> None:
    many = torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    with pytest.raises(ValueError, match="got x with 2147483648 heads"):
        _native.cuda_emulated().softmax_forward((many, None, None, -1, (0, 1.0)), many)
