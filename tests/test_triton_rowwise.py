"""Triton's norms and softmax, interpreted where there is no GPU.

Tiles are at most 4096 elements or one row, rows above 16384 are walked over in blocks of 8192, and
the norms' backward takes rows above 8192 as two blocks: that is what the widths here are about.
"""

from __future__ import annotations

import dataclasses

import fusedattn
import pytest
import torch
from compare import check, check_sum, device_for
from fusedattn.reference import functional as reference
from softmax_cases import FAR_SCALES, check_far_scores
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = device_for("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = 20_001


def normal(*shape: int, dtype: torch.dtype = FP32, seed: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)


# --- norms ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NormCase:
    rows: int = 5
    width: int = 70
    dtype: torch.dtype = FP32
    weight: torch.dtype | None = FP32
    residual: torch.dtype | None = None
    centre: bool = True
    options: tuple = ()


NORMS = {
    "rows and columns with tails": NormCase(rows=70),
    "a row fills its block": NormCase(width=64),
    "one column": NormCase(rows=33, width=1),
    "one row, whole": NormCase(rows=1, width=5000),
    "two blocks": NormCase(rows=3, width=12288),
    "two blocks, one nearly empty": NormCase(rows=3, width=8193, dtype=BF16, residual=FP32),
    "two blocks, rms": NormCase(rows=3, width=9000, centre=False),
    "two blocks, dropout": NormCase(
        3, 16000, BF16, BF16, residual=BF16, options=(("dropout_p", 0.3),)
    ),
    "wide": NormCase(rows=3, width=WIDE),
    "bf16, fp32 weights and residual": NormCase(dtype=BF16, residual=FP32),
    "fp16, bf16 weights": NormCase(dtype=FP16, weight=BF16, residual=FP16),
    "fp32, fp16 residual": NormCase(residual=FP16),
    "no weights": NormCase(weight=None),
    "rms": NormCase(rows=9, centre=False),
    "rms, weight offset": NormCase(centre=False, options=(("weight_offset", 1.0),)),
    "rms, wide": NormCase(rows=2, width=WIDE, centre=False, residual=BF16),
    "dropout and residual": NormCase(rows=9, residual=FP32, options=(("dropout_p", 0.3),)),
    "dropout, odd width, most dropped": NormCase(width=77, options=(("dropout_p", 0.75),)),
    "wide, dropout": NormCase(2, WIDE, residual=FP32, options=(("dropout_p", 0.5),)),
    "everything dropped": NormCase(residual=FP32, options=(("dropout_p", 1.0),)),
}


def run_norm(case: NormCase, module: object, dtype: torch.dtype | None, **how) -> dict[str, Tensor]:
    """Outputs and gradients; inputs cast to `dtype`, if given."""
    shape = (case.rows, case.width)
    device = DEVICE if how else "cpu"
    x = normal(*shape, dtype=case.dtype, seed=1).to(device, dtype)
    leaves = {"x": x}
    if case.weight is not None:
        leaves["weight"] = normal(case.width, dtype=case.weight, seed=2).to(device, dtype)
        if case.centre:
            leaves["bias"] = normal(case.width, dtype=case.weight, seed=3).to(device, dtype)
    if case.residual is not None:
        leaves["residual"] = normal(*shape, dtype=case.residual, seed=4).to(device, dtype)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    options = {"eps": 1e-5} | dict(case.options) | how
    if "dropout_p" in options:
        options["seed"] = -7_234_567_890_123_456_789
    function = module.layer_norm if case.centre else module.rms_norm
    given = {name: leaf for name, leaf in leaves.items() if name != "x"}
    found = function(x, case.width, **given, **options)
    out = found if isinstance(found, tuple) else (found,)
    cotangents = [normal(*shape, seed=5 + i).to(y.device, y.dtype) for i, y in enumerate(out)]
    grads = torch.autograd.grad(out, list(leaves.values()), cotangents)
    results = dict(zip(("out", "z"), (y.detach() for y in out), strict=False))
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norms(case: NormCase) -> None:
    actual = run_norm(case, fusedattn, None, backend="triton")
    ref = run_norm(case, reference, torch.float64)
    eager = run_norm(case, reference, case.dtype)
    coarse = min((case.dtype, case.residual or case.dtype), key=lambda d: -torch.finfo(d).eps)
    for name, value in actual.items():
        if name in ("dweight", "dbias") and {case.dtype, case.weight, coarse} == {FP32}:
            # What is normalised is as normal as dout.
            largest = normal(case.rows, case.width, seed=5).abs().max().item() ** 2
            sums = {"rows": case.rows, "largest_summand": largest}
            check_sum(value, ref[name], what=name, case=case, **sums)
            continue
        rule = {"what": name, "case": case, "gradient": name.startswith("d"), "tested": coarse}
        # Where z is rounded to less than the dtype of x, so is what is computed from it.
        slack = 2 * torch.finfo(coarse).eps if coarse != case.dtype else 0.0
        check(value, ref[name], eager[name], floor=slack, rows=case.rows, **rule)


@pytest.mark.parametrize("width", [70, WIDE])
@pytest.mark.parametrize(("mu", "sigma"), [(1e3, 0.1), (1e4, 1.0), (1e6, 1.0)])
def test_a_mean_far_from_zero(width: int, mu: float, sigma: float) -> None:
    """Rule 4: 4·2⁻²⁴·(1 + |μ|/σ)·|γ| and an ulp of the output."""
    x = (normal(3, width).double() * sigma + mu).float().to(DEVICE)
    out = fusedattn.layer_norm(x, width, backend="triton")
    want = reference.layer_norm(x.double(), width)
    allowed = 4 * 2.0**-24 * (1 + mu / sigma) + want.abs() * 2.0**-23
    assert ((out - want).abs() <= allowed).all()


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
    wide = normal(9, 103).to(DEVICE)
    want = fusedattn.layer_norm(wide[:, 3:80].contiguous(), 77, backend="triton")
    assert torch.equal(fusedattn.layer_norm(wide[:, 3:80], 77, backend="triton"), want)
    rows = wide[:1, 3:80].expand(9, 77)
    assert torch.equal(fusedattn.layer_norm(rows, 77, backend="triton"), want[:1].expand(9, 77))


def test_saved_statistics_of_any_stride() -> None:
    """Saved-tensor hooks may give back mean and rstd with gaps."""
    x, weight = (normal(*shape).to(DEVICE).requires_grad_() for shape in ((5, 16), (16,)))

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
    x = normal(3000, 16).to(DEVICE)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    fusedattn.layer_norm(x, 16, None, bias, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3000.0))


# --- softmax -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SoftmaxCase:
    shape: tuple[int, ...] = (2, 3, 5, 37)
    dtype: torch.dtype = FP32
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    causal: bool | str = False
    scale: float = 1.0
    dim: int = -1


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
    "fp16, negative scale": SoftmaxCase((2, 20, 40), FP16, scale=-0.5),
    "columns apart": SoftmaxCase((2, 100, 50), dim=1),
    "columns apart, wide": SoftmaxCase((1, 700, 40), dim=1),
    "wide": SoftmaxCase((2, WIDE)),
    "wide, causal, mask and bias": SoftmaxCase(
        (1, 2, WIDE), mask=(WIDE,), bias=(2, WIDE), causal=True
    ),
    "wide, blocks that no row sees": SoftmaxCase((2, WIDE), causal="top_left"),
}


def run_softmax(case: SoftmaxCase, module: object, dtype: torch.dtype | None, **how) -> dict:
    device = DEVICE if how else "cpu"
    leaves = {"x": normal(*case.shape, dtype=case.dtype).to(device, dtype).requires_grad_()}
    mask = None if case.mask is None else (normal(*case.mask, seed=3) < 0.5).to(device)
    if case.bias is not None:
        bias = normal(*case.bias, dtype=case.dtype, seed=2)
        leaves["bias"] = bias.to(device, dtype).requires_grad_()
    out = module.softmax(
        leaves["x"], case.dim, mask=mask, bias=leaves.get("bias"),
        scale=case.scale, causal=case.causal, **how,
    )  # fmt: skip
    cotangent = normal(*case.shape, dtype=case.dtype, seed=4).to(device, out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


@pytest.mark.parametrize("case", SOFTMAXES.values(), ids=SOFTMAXES)
def test_softmax(case: SoftmaxCase) -> None:
    actual = run_softmax(case, fusedattn, None, backend="triton")
    ref = run_softmax(case, reference, torch.float64)
    eager = run_softmax(case, reference, case.dtype)
    for name, value in actual.items():
        rule = {"what": name, "case": case, "gradient": name.startswith("d")}
        check(value, ref[name], eager[name], **rule)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("scale", FAR_SCALES)
def test_scores_far_from_zero(scale: float, dtype: torch.dtype) -> None:
    for width in (3, 100, WIDE):
        check_far_scores("triton", width, scale, dtype)


@pytest.mark.parametrize("width", [20, WIDE])
def test_softmax_of_infinities(width: int) -> None:
    x = normal(4, width).to(DEVICE)
    x[0] = -torch.inf
    x[1, 3], x[2, 4], x[3, 5] = torch.inf, torch.nan, -torch.inf
    out = fusedattn.softmax(x, backend="triton")
    assert out[0].count_nonzero() == 0
    assert out[1:3].isnan().all()
    assert out[3, 5] == 0
    assert out[3].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_layouts(causal: bool) -> None:
    x = normal(2, 3, 33, 40).to(DEVICE)
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
    for case in (NormCase(rows=300, width=width), NormCase(300, width, centre=False)):
        test_norms(case)
    test_softmax(SoftmaxCase((300, width)))
