"""softmax against the oracle: widths, dimensions, masks, biases, causal, NaN and infinities."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, F64
from cases.softmax import FAR_SCALES, SoftmaxCase, check_far_scores, check_softmax, results

INF, NAN = float("inf"), float("nan")

WIDTHS = [
    pytest.param((5, 1), id="one column"),
    pytest.param((5, 31), id="below two vectors"),
    pytest.param((5, 33), id="a vector and one"),
    pytest.param((33, 64), id="whole vectors"),
    pytest.param((3, 1023), id="1023"),
    pytest.param((3, 8192), id="one chunk"),
    pytest.param((40, 8193), id="two chunks, a row per thread"),
    pytest.param((2, 65535), id="65535, rows shared"),
    pytest.param((1, 65537), id="65537, one row"),
]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("shape", WIDTHS)
def test_width(shape, dtype, backend):
    check_softmax(3 * torch.randn(shape, dtype=F64).to(dtype), backend)


def test_a_million_columns(fast_backend):
    check_softmax(torch.randn(1, 2**20 + 1), fast_backend)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("shape", [(17, 300), (70, 9000)], ids=["narrow", "wide"])
def test_instruction_set(shape, dtype, instruction_set):
    x = torch.randn(shape, dtype=F64).to(dtype)
    mask, bias = torch.rand(shape) < 0.7, torch.randn(shape[0], 1).to(dtype)
    for dim in (0, 1):
        check_softmax(x, "cpu", dim)
        check_softmax(x, "cpu", dim, mask=mask, bias=bias, scale=-0.5)
    check_softmax(x, "cpu", causal=True)
    check_softmax(x.t(), "cpu", causal="top_left", mask=mask.t())


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("shape", [(17, 300), (33, 656), (130, 30), (9, 5000), (9, 9000)], ids=str)
def test_past_the_caches(shape, dtype, instruction_set, small_caches):
    """Tensors too large for the caches are read ahead and written past them, to the same bits."""
    x, dout = torch.randn(2, *shape, dtype=F64).to(dtype)
    softmax = functools.partial(fusedattn.softmax, backend="cpu")
    for options in ({}, {"causal": True}, {"bias": torch.randn(shape[1]).to(dtype)}):
        run = functools.partial(results, x, -1, dout, softmax, **options)
        within = run()
        for cache in (1, 8 * x.nbytes):  # too small, and too small for what is near
            with small_caches(cache):
                past = run()
            for name, expected in within.items():
                assert torch.equal(past[name], expected), (name, cache, options)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", [65, 136, 300])
def test_largest_of_16_bits(width, dtype, instruction_set):
    """Found among integers, by other rules where nothing is above 0: wherever it lies."""
    x = torch.randn(width, width).fill_diagonal_(300.0)
    for shift in (0.0, -300.0, -400.0):
        check_softmax((x + shift).to(dtype), "cpu")
    specials = (math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0)
    for special, shift in itertools.product(specials, (0.0, -400.0)):
        y = (x + shift).fill_diagonal_(special).to(dtype)
        out = fusedattn.softmax(y, -1, backend="cpu")
        torch.testing.assert_close(out, torch.softmax(y.double(), -1).to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("width", [1, 7, 16, 30, 32, 45, 64, 65])
def test_short_rows(width, dtype, instruction_set, small_caches):
    """A few vectors stay in registers, to the same bits as rows of which more has to be asked; also
    on their way past the caches."""
    x, dout = torch.randn(2, 37, 1, width, dtype=F64).to(dtype)
    found = check_softmax(x, "cpu", dout=dout)
    softmax = functools.partial(fusedattn.softmax, backend="cpu")
    with small_caches():
        past = results(x, -1, dout, softmax)
    for name, seen in results(x, -1, dout, softmax, causal=True).items():
        assert torch.equal(found[name], seen), name
        assert torch.equal(past[name], seen), name


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dim", range(-5, 5))
def test_dimension(dim, dtype, backend):
    check_softmax(torch.randn(3, 4, 5, 6, 19).to(dtype), backend, dim)


SHAPES = [
    ((), -1), ((7,), 0), ((130, 40), 0), ((2, 50, 3), 1), ((2, 9, 200), 1), ((2, 3, 4, 5, 6, 7), 3),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_rank(shape, dim, backend):
    found = check_softmax(torch.randn(shape), backend, dim)
    assert found["out"].shape == shape


BROADCASTS = [
    (2, 4, 21, 35), (1, 4, 21, 35), (2, 1, 21, 35), (2, 4, 1, 35), (2, 4, 21, 1), (1, 4, 1, 1),
    (2, 1, 1, 35), (4, 21, 35), (21, 35), (35,), (1,), (),
]  # fmt: skip


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_mask_broadcast(shape, dim, backend):
    mask = torch.rand(shape) < 0.6
    out = check_softmax(torch.randn(2, 4, 21, 35), backend, dim, mask=mask)["out"]
    assert (out[~mask.expand(out.shape)] == 0).all()


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16), (F16, F16), (F64, F64)])
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_bias_broadcast_and_its_gradient(shape, dtypes, backend):
    x, bias = torch.randn(2, 4, 21, 35).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    if dtypes == (F32, BF16):
        # Eager would round the gradient of every element to bfloat16.
        out = fusedattn.softmax(x, bias=bias, backend=backend)
        assert torch.equal(out, fusedattn.softmax(x, bias=bias.float(), backend=backend))
        return
    check_softmax(x, backend, bias=bias, scale=0.3, causal=True)


@pytest.mark.parametrize("dim", range(6))
def test_broadcast_over_more_than_four_dimensions(dim, backend):
    x = torch.randn(2, 3, 4, 3, 2, 5)
    mask, bias = torch.rand(3, 1, 3, 1, 5) < 0.7, torch.randn(2, 1, 4, 1, 2, 1)
    check_softmax(x, backend, dim, mask=mask, bias=bias)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("scale", [2.5, 0.0, -1.5, 1e-3])
def test_scale(scale, dtype, backend):
    x = torch.randn(9, 70).to(dtype)
    check_softmax(x, backend, scale=scale)
    check_softmax(x, backend, 0, scale=scale, bias=torch.randn(9, 1).to(dtype))


@pytest.mark.parametrize("shape", [(40, 40), (30, 57), (57, 30), (2, 3, 1, 9), (5, 8300)], ids=str)
@pytest.mark.parametrize("causal", [True, "bottom_right", "top_left"])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_causal_is_its_mask(causal, shape, scale, backend):
    x = torch.randn(shape)
    check_softmax(x, backend, causal=causal, scale=scale)
    diagonal = 0 if causal == "top_left" else shape[-1] - shape[-2]
    mask = torch.ones(shape[-2:], dtype=torch.bool).tril(diagonal)
    out = fusedattn.softmax(x, causal=causal, scale=scale, backend=backend)
    assert torch.equal(out, fusedattn.softmax(x, mask=mask, scale=scale, backend=backend))


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_row_with_nothing_to_see(dim, dtype, backend):
    """pytorch#103749 and #55056: masked in full or −inf throughout is 0, with gradient 0."""
    x = torch.randn(40, 40).to(dtype)
    x[5] = x[:, 5] = -INF
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[7] = mask[:, 7] = False
    found = check_softmax(x, backend, dim, mask=mask)
    for name in ("out", "dx"):
        rows = found[name] if dim == -1 else found[name].t()
        assert (rows[[5, 7]] == 0).all()


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("width", [2, 40, 8200])
def test_not_finite(width, dim, backend):
    """pytorch#6864: NaN and +inf spread over their row as in torch; −inf is a probability of 0."""
    x = torch.randn(17, width)
    x[0, 1], x[1, 0], x[2, 1], x[3, 0] = INF, -INF, NAN, 3e38
    x[4] = NAN
    x = x if dim == -1 else x.t().contiguous()
    out = fusedattn.softmax(x, dim, backend=backend)
    torch.testing.assert_close(out, torch.softmax(x, dim), equal_nan=True)
    hidden = fusedattn.softmax(x, dim, mask=x.isfinite(), backend=backend)
    assert hidden.isfinite().all()


def test_extremes_of_float16(backend):
    """quack's tests, darts#3087: the range of float16, and shifts, lose nothing."""
    x = torch.tensor([65504.0, -65504.0, 0.0], dtype=F16)
    assert fusedattn.softmax(x, backend=backend).tolist() == [1.0, 0.0, 0.0]
    y = torch.randint(-8, 8, (20, 100)).to(F16)
    out = fusedattn.softmax(y, backend=backend)
    assert torch.equal(out, fusedattn.softmax(y + 512, backend=backend))
    assert (out.double().sum(-1) - 1).abs().max() < 100 * 2.0**-11
    fill = torch.randn(4, 9, dtype=F16).masked_fill(
        torch.rand(4, 9) < 0.3, torch.tensor(-1e9).half()
    )
    check_softmax(fill, backend)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("scale", FAR_SCALES)
def test_scores_far_from_zero(scale, dtype, backend):
    for width in (3, 100, 9000):
        check_far_scores(backend, width, scale, dtype)


def test_wide_row_is_the_same_on_any_number_of_threads():
    x = torch.randn(3, 70000)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(fusedattn.softmax(x))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


DEVICE_CASES = {
    "narrow": SoftmaxCase((9, 33)),
    "wide": SoftmaxCase((2, 5000), scale=0.5),
    "another dimension": SoftmaxCase((3, 20, 5), mask=(1, 20, 5), dim=1),
    "six dimensions": SoftmaxCase((2, 3, 2, 2, 3, 7), mask=(2, 1, 7), bias=(3, 1, 1, 3, 1), dim=2),
    "causal": SoftmaxCase((2, 12, 19), bias=(12, 1), causal=True, scale=-0.7),
    "nothing to see": SoftmaxCase((2, 12, 7), mask=(7,), causal="bottom_right"),
}


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("case", DEVICE_CASES.values(), ids=DEVICE_CASES)
@pytest.mark.backends("triton", "cuda_emulated")
def test_device_kernels(backend, case, dtype):
    """The kernels of GPUs where there is none: interpreted, emulated."""
    dataclasses.replace(case, dtype=dtype).check(backend)
