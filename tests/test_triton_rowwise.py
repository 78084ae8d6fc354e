"""Triton's norms and softmax, interpreted where there is no GPU.

Tiles are at most 4096 elements or one row, rows above 16384 are walked over in blocks of 8192, and
the norms' backward takes rows above 8192 as two blocks: that is what the widths here are about.
"""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, HALF_AND_SINGLE, Source
from cases.norm import NormCase, check_norm
from cases.softmax import FAR_SCALES, SoftmaxCase, check_far_scores
from compare import device_for
from fusedattn.reference import functional as reference
from test_cuda_rowwise import layer, rms
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = device_for("triton")
WIDE = 20_001
normal = Source(DEVICE).normal

# --- norms ---------------------------------------------------------------------------------------

NORMS = {
    "rows and columns with tails": layer(70, 70),
    "a row fills its block": layer(5, 64),
    "one column": layer(33, 1),
    "one row, whole": layer(1, 5000),
    "two blocks": layer(3, 12288),
    "two blocks, one nearly empty": layer(3, 8193, BF16, residual=F32),
    "two blocks, rms": rms(3, 9000),
    "two blocks, dropout": layer(3, 16000, BF16, weight=BF16, residual=BF16, dropout_p=0.3),
    "wide": layer(3, WIDE),
    "bf16, fp32 weights and residual": layer(5, 70, BF16, residual=F32),
    "fp16, bf16 weights": layer(5, 70, F16, weight=BF16, bias=BF16, residual=F16),
    "fp32, fp16 residual": layer(5, 70, residual=F16),
    "no weights": layer(5, 70, weight=None, bias=None),
    "rms": rms(9, 70),
    "rms, weight offset": rms(5, 70, weight_offset=1.0),
    "rms, wide": rms(2, WIDE, residual=BF16),
    "dropout and residual": layer(9, 70, residual=F32, dropout_p=0.3),
    "dropout, odd width, most dropped": layer(5, 77, dropout_p=0.75),
    "wide, dropout": layer(2, WIDE, residual=F32, dropout_p=0.5),
    "everything dropped": layer(5, 70, residual=F32, dropout_p=1.0),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norms(case: NormCase) -> None:
    check_norm(case, "triton")


@pytest.mark.parametrize("width", [70, WIDE])
@pytest.mark.parametrize(("mean", "sigma"), [(1e3, 0.1), (1e4, 1.0), (1e6, 1.0)])
def test_a_mean_far_from_zero(width: int, mean: float, sigma: float) -> None:
    check_norm(layer(3, width, mean=mean, sigma=sigma), "triton", ill=True)


@pytest.mark.parametrize("width", [7, 70, 16_000, WIDE])
def test_constant_rows(width: int) -> None:
    """The rounding of their sum is no deviation."""
    x = (1e6 * torch.rand(9, 1, device=DEVICE)).repeat(1, width)
    assert torch.equal(fusedattn.layer_norm(x, width, backend="triton"), torch.zeros_like(x))


@pytest.mark.parametrize("width", [77, WIDE])
def test_dropout_is_that_of_the_reference(width: int) -> None:
    seed = torch.tensor([2**62 + 3])
    x, zeros = torch.ones(70 if width == 77 else 2, width), torch.zeros(width)
    options = {"residual": torch.zeros_like(x), "dropout_p": 0.6, "seed": seed}
    want = reference.dropout(x, 0.6, seed) != 0
    moved = {name: y.to(DEVICE) if isinstance(y, Tensor) else y for name, y in options.items()}
    _, z = fusedattn.layer_norm(x.to(DEVICE), width, zeros.to(DEVICE), backend="triton", **moved)
    assert torch.equal(z.cpu() != 0, want)


def test_norm_rows_at_any_distance() -> None:
    wide = normal(9, 103)
    want = fusedattn.layer_norm(wide[:, 3:80].contiguous(), 77, backend="triton")
    assert torch.equal(fusedattn.layer_norm(wide[:, 3:80], 77, backend="triton"), want)
    rows = wide[:1, 3:80].expand(9, 77)
    assert torch.equal(fusedattn.layer_norm(rows, 77, backend="triton"), want[:1].expand(9, 77))


def test_saved_statistics_of_any_stride() -> None:
    """Saved-tensor hooks may give back mean and rstd with gaps."""
    x, weight = (normal(*shape).requires_grad_() for shape in ((5, 16), (16,)))

    def gradients() -> tuple[Tensor, ...]:
        out = fusedattn.layer_norm(x, 16, weight, backend="triton")
        return torch.autograd.grad(out.square().sum(), (x, weight))

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: torch.stack([y, y], -1), lambda y: y[..., 0]
    ):
        found = gradients()
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_a_sum_of_ones_over_many_rows() -> None:
    x = normal(3000, 16)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    fusedattn.layer_norm(x, 16, None, bias, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3000.0))


# --- softmax -------------------------------------------------------------------------------------


SOFTMAXES = {
    "rows and columns with tails": SoftmaxCase((2, 70, 37)),
    "one column": SoftmaxCase((33, 1)),
    "one row per head, mask of keys": SoftmaxCase((2, 3, 1, 100), mask=(2, 1, 1, 100)),
    "mask and bias, causal": SoftmaxCase(
        (2, 3, 33, 70), mask=(33, 70), bias=(3, 1, 70), causal=True, scale=0.3
    ),
    "rows that see nothing": SoftmaxCase((1, 2, 70, 33), causal=True),
    "top-left": SoftmaxCase((2, 3, 33, 70), causal="top_left"),
    "mask and bias of queries": SoftmaxCase((2, 2, 20, 40), mask=(20, 1), bias=(2, 1, 20, 1)),
    "bf16, bias": SoftmaxCase((2, 20, 40), BF16, bias=(20, 40)),
    "fp16, negative scale": SoftmaxCase((2, 20, 40), F16, scale=-0.5),
    "columns apart": SoftmaxCase((2, 100, 50), dim=1),
    "columns apart, wide": SoftmaxCase((1, 700, 40), dim=1),
    "wide": SoftmaxCase((2, WIDE)),
    "wide, causal, mask and bias": SoftmaxCase(
        (1, 2, WIDE), mask=(WIDE,), bias=(2, WIDE), causal=True
    ),
    "wide, blocks that no row sees": SoftmaxCase((2, WIDE), causal="top_left"),
}


@pytest.mark.parametrize("case", SOFTMAXES.values(), ids=SOFTMAXES)
def test_softmax(case: SoftmaxCase) -> None:
    case.check("triton")


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("scale", FAR_SCALES)
def test_scores_far_from_zero(scale: float, dtype: torch.dtype) -> None:
    for width in (3, 100, WIDE):
        check_far_scores("triton", width, scale, dtype)


@pytest.mark.parametrize("width", [20, WIDE])
def test_softmax_of_infinities(width: int) -> None:
    x = normal(4, width)
    x[0] = -torch.inf
    x[1, 3], x[2, 4], x[3, 5] = torch.inf, torch.nan, -torch.inf
    out = fusedattn.softmax(x, backend="triton")
    assert out[0].count_nonzero() == 0
    assert out[1:3].isnan().all()
    assert out[3, 5] == 0
    assert out[3].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_layouts(causal: bool) -> None:
    x = normal(2, 3, 33, 40)
    want = fusedattn.softmax(x, causal=causal, backend="triton")
    for order in ((0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2)):
        back = [order.index(i) for i in range(4)]
        moved = x.permute(order).contiguous().permute(back)
        found = fusedattn.softmax(moved, causal=causal, backend="triton")
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)
    spread = x[:, :, :1].expand(2, 3, 33, 40)
    found = fusedattn.softmax(spread, backend="triton")
    one = fusedattn.softmax(x[:, :, :1], backend="triton")
    torch.testing.assert_close(found, one.expand_as(found), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [65_537, 2**20 + 1])
def test_very_wide_rows_on_the_gpu(width: int) -> None:
    for case in (layer(300, width), rms(300, width)):
        check_norm(case, "triton")
    SoftmaxCase((300, width)).check("triton")
