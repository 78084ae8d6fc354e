"""layer_norm and rms_norm against the oracle, by regimes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
import sys
from pathlib import Path

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from cases.norm import NormCase, check_norm, results
from compare import check_sum, device_for
from fusedattn import _native
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPS = ("layer_norm", "rms_norm")

SHAPES = {
    "one element": ((1, 1), 1),
    "width 1": ((33, 1), 1),
    "below a vector": ((5, 7), 1),
    "whole vectors": ((8, 64), 1),
    "tail after vectors": ((7, 100), 1),
    "more rows than a flush": ((300, 24), 1),
    "rows for every thread": ((67, 1024), 1),
    "one chunk": ((3, 2048), 1),
    "a chunk and a tail": ((9, 2049), 1),
    "one wide row": ((1, 30000), 1),
    "few wide rows": ((3, 20001), 1),
    "more wide rows": ((17, 8200), 1),
    "vector": ((50,), 1),
    "batch of sequences": ((2, 3, 5, 48), 1),
    "two dimensions": ((3, 7, 8, 16), 2),
    "all dimensions": ((4, 6), 2),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, op, backend):
    if backend == "triton" and dtype == F64:
        pytest.skip("float64 is for the CPU")
    check_norm(NormCase(op, *shape, dtype=dtype, weight=dtype, bias=dtype), backend)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_every_backend(op, dtype, any_backend):
    for shape in ((5, 40), (2, 3, 130)):
        for residual in (None, dtype, F32):
            case = NormCase(op, shape, dtype=dtype, residual=residual, dropout_p=0.25)
            check_norm(case, any_backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(op, dtype, instruction_set):
    for shape in ((1, 1), (9, 77), (5, 2100), (1, 30000)):
        for residual in (None, dtype, F32 if dtype != F64 else F64):
            case = NormCase(
                op, shape, dtype=dtype, weight=dtype, residual=residual, dropout_p=0.3,
                weight_offset=1.0,
            )  # fmt: skip
            check_norm(case, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("op", OPS)
def test_a_row_among_others(op, dtype, instruction_set, small_caches):
    """While one row is written the sums of a later one run; to the bits of each row alone."""
    parameters = ((None, None), (F32, None), (F32, dtype))
    for width, (weight, bias) in itertools.product((1, 33, 128, 300, 2048), parameters):
        case = NormCase(op, (35, width), dtype=dtype, weight=weight, bias=bias)
        made = case.inputs()
        x = made.pop("x")
        x[[1, 33], :64] += 1e3  # the first elements tell nothing of the others' mean
        x[4] *= torch.finfo(dtype).max / 8  # squares leave the range
        given = {"weight": made.get("weight")} | ({"bias": made["bias"]} if "bias" in made else {})
        out = functools.partial(
            getattr(fusedattn, op), normalized_shape=width, **given, eps=1e-6, backend="cpu"
        )
        alone = torch.cat([out(row[None]) for row in x])
        assert torch.equal(out(x), alone), case
        assert torch.equal(out(x[::2]), alone[::2]), case
        for cache in (1, 4 * x.nbytes):  # all rows past the caches, and half of them
            with small_caches(cache):
                assert torch.equal(out(x), alone), (cache, case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("op", OPS)
def test_past_the_caches(op, dtype, instruction_set, small_caches):
    """Tensors too large for the caches are read ahead and written past them, to the same bits."""
    for shape in ((1, 1), (9, 77), (130, 96), (19, 600), (5, 2100), (3, 5000), (1, 30000)):
        for residual, dropout_p in ((None, 0.0), (dtype, 0.0), (F32, 0.0), (dtype, 0.3)):
            case = NormCase(op, shape, dtype=dtype, residual=residual, dropout_p=dropout_p)
            made = case.inputs()
            within = results(made, case, fusedattn, backend="cpu")
            for cache in (1, 8 * made["x"].nbytes):  # too small, and too small for what is near
                with small_caches(cache):
                    past = results(made, case, fusedattn, backend="cpu")
                for name, expected in within.items():
                    assert torch.equal(past[name], expected), (name, cache, case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("op", OPS)
def test_some_rows_past_the_caches(op, dtype, instruction_set, small_caches):
    """With a residual half of the output stays, where there is room; to the same bits."""
    for shape, weight, bias in (
        ((130, 96), dtype, dtype), ((40, 2048), None, None), ((64, 1001), F32, None),
        ((1, 70), F32, F32),
    ):  # fmt: skip
        for residual in (dtype, F32):
            case = NormCase(op, shape, 1, dtype, weight, bias, residual)
            made = case.inputs()
            for more in (0.0, 1e3):  # then the first elements tell nothing of the others' mean
                made["x"][..., :64] += more
                within = results(made, case, fusedattn, backend="cpu")
                with small_caches(4 * made["x"].nbytes):
                    past = results(made, case, fusedattn, backend="cpu")
                for name, expected in within.items():
                    assert torch.equal(past[name], expected), (name, more, case)


def test_the_size_of_the_cache():
    """As the system has it; of a socket's 16 MiB for each thread."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if _native.cpu is None or platform.machine() != "x86_64" or not file.exists():
        pytest.skip("needs the native kernels, Linux and a cache of the third level")
    kilobytes = int(file.read_text().strip().removesuffix("K"))
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    most = 16 << 20 if intel else sys.maxsize
    assert _native.cpu.cache_bytes(1) == min(kilobytes << 10, most)
    assert _native.cpu.cache_bytes(1 << 20) >= 2 * _native.cpu.cache_bytes(1)


@pytest.mark.parametrize(
    ("dtype", "weight"), list(itertools.product([F32, BF16, F16, F64], repeat=2))
)
@pytest.mark.parametrize("op", OPS)
def test_dtype_pairs(op, dtype, weight, fast_backend):
    """pytorch#190055: the output has x's dtype, every gradient that of its own input."""
    check_norm(NormCase(op, (9, 70), dtype=dtype, weight=weight, bias=BF16), fast_backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("residual", [F32, BF16, F16, F64])
@pytest.mark.parametrize("op", OPS)
def test_residual_of_any_dtype(op, residual, dtype, fast_backend):
    shape = (9, 70)
    check_norm(NormCase(op, shape, dtype=dtype, residual=residual), fast_backend)
    check_norm(NormCase(op, (3, 20000), dtype=dtype, residual=residual), fast_backend)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_residual_dtype(op, dtype, backend):
    """A half block starts an fp32 stream, or ends one; what is normalised is what is returned."""
    device = device_for(backend)
    x, r, w = (torch.randn(s, device=device) for s in ((6, 33), (6, 33), (33,)))
    x, r = x.to(dtype), r.to(BF16)
    call = getattr(fusedattn, op)
    for stream in (F32, BF16, F16):
        out, z = call(x, 33, w, eps=1e-5, residual=r, residual_dtype=stream, backend=backend)
        assert (out.dtype, z.dtype) == (dtype, stream)
        assert torch.equal(z, (x.float() + r.float()).to(stream))
        plain = call(z.to(F32), 33, w, eps=1e-5, backend=backend)
        torch.testing.assert_close(
            out, plain.to(dtype), rtol=0.01 if dtype == BF16 else 1e-6, atol=1e-6
        )


@pytest.mark.parametrize("weight", [None, F32])
@pytest.mark.parametrize("bias", [None, F32])
@pytest.mark.parametrize("op", OPS)
def test_weight_and_bias_are_optional(op, bias, weight, backend):
    """pytorch#193016: a bias without a weight, a weight without a bias."""
    check_norm(
        NormCase(op, (3, 7, 8, 16), 2, weight=weight, bias=bias, weight_offset=-0.5), backend
    )


@pytest.mark.parametrize("grads", [("out",), ("z",), ("out", "z")], ids="+".join)
@pytest.mark.parametrize("residual", [BF16, F32])
@pytest.mark.parametrize("op", OPS)
def test_which_outputs_have_a_gradient(op, residual, grads, backend):
    for dropout_p in (0.0, 0.4):
        case = NormCase(
            op, (6, 50), dtype=BF16, residual=residual, grads=grads, dropout_p=dropout_p
        )
        check_norm(case, backend)


@pytest.mark.parametrize(
    ("mean", "sigma", "width"),
    [(2000, 1, 4), (1e2, 1e-3, 16), (1e3, 1e-3, 16), (1e4, 1e-3, 16), (1e3, 0.1, 1024),
     (1e4, 1, 1024), (1e6, 1, 1024), (-1e6, 1, 5000), (1e4, 1, 40000)],
)  # fmt: skip
def test_large_mean(mean, sigma, width, backend):
    """pytorch#51102: E[x²] − E[x]² would cancel."""
    check_norm(NormCase(shape=(5, width), mean=mean, sigma=sigma), backend, ill=True)


@pytest.mark.parametrize("where", [0, 20, 63, 1500])
def test_outlier(where, backend):
    """The first elements' mean, from which the cpu kernels measure, far from the row's."""
    case = NormCase(shape=(3, 1600))
    made = case.inputs(device_for(backend))
    made["x"][:, where] = 3e4
    check_norm(case, backend, made, ill=True)


@pytest.mark.parametrize("width", [16, 1000, 30000])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_out_of_range(scale, op, width, fast_backend):
    """pytorch#178123: torch gives NaN at 1e30. The reference overflows as torch does."""
    if fast_backend == "reference":
        pytest.skip("the reference computes in the dtype of its inputs")
    x = torch.randn(3, width)
    call = getattr(fusedattn, op)
    want = call(x.double(), width, eps=0.0)
    found = call(x * scale, width, eps=0.0)
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)
    leaf = (x * scale).requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf, width, eps=0.0), leaf, torch.ones_like(leaf) * 0.5)
    assert grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "scale"), [(F16, 3e4), (BF16, 1e38), (F32, 1e38)])
def test_values_near_the_largest(dtype, scale, fast_backend):
    if fast_backend == "reference":
        pytest.skip("the reference computes in the dtype of its inputs")
    x = (torch.rand(4, 96, dtype=F64) * 2 * scale - scale).to(dtype)
    for op in OPS:
        call = getattr(fusedattn, op)
        want = call(x.double(), 96, eps=0.0)
        torch.testing.assert_close(call(x, 96, eps=0.0).double(), want, rtol=0.01, atol=1e-5)


def test_width_1(backend):
    """pytorch#188375"""
    device = device_for(backend)
    x = torch.randn(33, 1, dtype=BF16, device=device, requires_grad=True)
    w, b = (torch.randn(1, dtype=BF16, device=device, requires_grad=True) for _ in range(2))
    out = fusedattn.layer_norm(x, (1,), w, b, backend=backend)
    assert torch.equal(out, b.expand(33, 1))
    dx, dw, db = torch.autograd.grad(out, (x, w, b), torch.ones_like(out))
    assert not dx.any()
    assert not dw.any()
    assert db.item() == 33


@pytest.mark.parametrize("width", [20, 60, 64, 1003])
def test_constant_rows_of_large_numbers(width):
    """mean · rstd overflows, n does not."""
    x = torch.full((3, width), 2e36, requires_grad=True)
    out = fusedattn.layer_norm(x, width, torch.ones(width), backend="cpu")
    (dx,) = torch.autograd.grad(out, x, torch.randn(3, width))
    assert dx.isfinite().all()


def test_constant_rows(backend):
    x = torch.full((5, 77), 3.3, device=device_for(backend))
    assert torch.equal(fusedattn.layer_norm(x, 77, backend=backend), torch.zeros_like(x))


@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity_stay_in_their_rows(op, backend):
    x = torch.randn(6, 40, device=device_for(backend))
    call = getattr(fusedattn, op)
    clean = call(x, 40, eps=1e-5, backend=backend)
    x[1, 3], x[4, 39], x[5, 0] = float("nan"), float("inf"), -float("inf")
    found = call(x, 40, eps=1e-5, backend=backend)
    want = getattr(F, op)(x, (40,), eps=1e-5)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_depend_on_the_batch(op, fast_backend):
    """vllm#48271: one row, some rows, all rows, on one thread and on two: the same bits."""
    x, w = torch.randn(600, 96), torch.randn(96)
    wide = torch.randn(20, 9000)

    def grads(x: Tensor, width: int, *w: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        out = getattr(fusedattn, op)(x, width, *w, eps=1e-5, backend=fast_backend)
        return out, torch.autograd.grad(out, x, x.detach().cos())[0]

    def equal_rows(x: Tensor, sizes: tuple[int, ...], *w: Tensor) -> None:
        everything = grads(x, x.shape[1], *w)
        for n in sizes:
            for a, b in zip(grads(x[:n], x.shape[1], *w), everything, strict=True):
                assert torch.equal(a, b[:n])

    equal_rows(x, (1, 255, 257), w)
    equal_rows(wide, (1, 2, 3, 5))
    before = torch.get_num_threads()
    both = grads(wide, 9000), grads(x, 96, w)
    torch.set_num_threads(1)
    try:
        alone = grads(wide, 9000), grads(x, 96, w)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(itertools.chain(*both), itertools.chain(*alone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [65536, 40000])
def test_sums_over_many_rows(rows, fast_backend):
    """llm.c#476: the sums run in float32 at least, over blocks of rows."""
    x = torch.randn(rows, 8, dtype=BF16)
    w, b = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    out = fusedattn.layer_norm(x, 8, w, b, backend=fast_backend)
    ones = torch.ones_like(out)
    _, db = torch.autograd.grad(out, (w, b), ones, retain_graph=True)
    assert torch.equal(db, torch.full((8,), float(rows)))
    dout = (torch.randn(rows, 8) + 0.1).to(BF16)
    dw, db = torch.autograd.grad(out, (w, b), dout)
    n = F.layer_norm(x.double(), (8,))
    summands = {"dweight": n * dout.double(), "dbias": dout.double()}
    for (name, s), found in zip(summands.items(), (dw, db), strict=True):
        check_sum(found, s.sum(0), rows=rows, largest_summand=s.abs().max().item(), what=name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias", [None, F32])
@pytest.mark.parametrize("op", OPS)
def test_heads(op, bias, dtype, instruction_set, small_caches):
    """Four and eight vectors, whole and not; more rows than are summed at a time."""
    for width in (14, 16, 30, 32, 57, 60, 64, 113, 128):
        case = NormCase(op, (300, width), dtype=dtype, weight=dtype, bias=bias)
        made = case.inputs()
        check_norm(case, "cpu", made)
        within = results(made, case, fusedattn, backend="cpu")
        with small_caches(1):
            past = results(made, case, fusedattn, backend="cpu")
        for name, expected in within.items():
            assert torch.equal(past[name], expected), (name, width)
        # What was normalised lies in another dtype than x, and takes no gradient of its own.
        stream = F16 if dtype == F32 else F32
        check_norm(dataclasses.replace(case, residual=stream, grads=("out",)), "cpu")


@pytest.mark.parametrize("rows", [200, 300])
@pytest.mark.parametrize("op", OPS)
def test_sums_over_the_rows_of_threads(op, rows):
    """With and without a sum in float64 beside that of the last 128 rows."""
    check_norm(NormCase(op, (rows, 300)), "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wide_rows_on_many_threads(dtype, small_caches):
    """Near enough, they are divided by columns; the sums over rows are flushed on the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with small_caches(2**30):
            check_norm(NormCase("layer_norm", (140, 19000), dtype=dtype, weight=dtype), "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [65535, 65536, 65537, 131072, 2**20 + 1])
@pytest.mark.parametrize("op", OPS)
def test_very_wide_rows(op, width, fast_backend):
    """Liger-Kernel#1252, triton#2858"""
    check_norm(NormCase(op, (2, width)), fast_backend)
