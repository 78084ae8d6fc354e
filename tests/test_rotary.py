"""apply_rotary and apply_rotary_qk against the oracle: layouts, tables, positions, bad input."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.position import check_rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def angles(rows: int, half: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of fp64 phases, (rows, half), float32."""
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
    return phase.cos().float(), phase.sin().float()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


SHAPES = {
    "vectors": ((2, 3, 40, 64), 32),
    "wide": ((1, 2, 9, 128), 64),
    "partial": ((2, 3, 17, 80), 16),
    "remainder": ((1, 5, 7, 44), 19),
    "one-pair": ((2, 2, 5, 2), 1),
    "one-row": ((3, 8, 1, 64), 32),
    "rank-2": ((11, 32), 16),
    "rank-3": ((3, 11, 32), 16),
    "rank-5": ((2, 2, 3, 11, 32), 16),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype, shape, interleaved, instruction_set):
    size, half = SHAPES[shape]
    cos, sin = angles(size[-2] + 3, half)
    check_rotary(normal(*size, dtype=dtype), cos, sin, "cpu", interleaved=interleaved, offset=3)


@pytest.mark.parametrize("offset", [0, 4])
def test_batched_tables(offset, backend):
    """Liger-Kernel#477: each sample has its own angles."""
    x, each = normal(3, 2, 5, 16), [angles(40, 8)[i] for i in (0, 1)]
    cos, sin = (torch.stack([t[3 * b : 3 * b + 9] for b in range(3)]) for t in each)
    check_rotary(x, cos, sin, backend, offset=offset)
    out = fusedattn.apply_rotary(x, cos, sin, offset=offset, backend=backend)
    for b in range(3):
        one = fusedattn.apply_rotary(x[b], cos[b], sin[b], offset=offset, backend=backend)
        assert torch.equal(out[b], one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_dtypes(dtype, backend):
    cos, sin = (t.to(dtype) for t in angles(20, 8))
    x = normal(2, 3, 9, 16, dtype=torch.bfloat16)
    out = fusedattn.apply_rotary(x, cos, sin, backend=backend)
    assert torch.equal(out, fusedattn.apply_rotary(x, cos.float(), sin.float(), backend=backend))
    check_rotary(x.double(), cos, sin, backend)


def test_partial_tail_is_untouched(backend):
    """pie#603, Liger-Kernel#1451: the rotary dim, not the head dim, makes the pairs."""
    x, (cos, sin) = normal(1, 2, 1655, 256, dtype=torch.bfloat16), angles(2400, 32)
    out = fusedattn.apply_rotary(x, cos, sin, offset=700, backend=backend)
    assert torch.equal(out[..., 64:], x[..., 64:])
    alone = fusedattn.apply_rotary(x[..., :64], cos, sin, offset=700, backend=backend)
    assert torch.equal(out[..., :64], alone)


def test_many_rows(fast_backend):
    """pytorch#142228 and others: 65 536 rows and more."""
    cos, sin = angles(70_000, 2)
    check_rotary(normal(1, 1, 65_536, 4), cos, sin, fast_backend)
    check_rotary(normal(70_000, 4), cos, sin, fast_backend)


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_query_and_key_in_one_call(heads, backend):
    cos, sin = angles(20, 16)
    q, k = normal(2, 8, 12, 32), normal(2, heads, 12, 32)
    found = fusedattn.apply_rotary_qk(q, k, cos, sin, backend=backend)
    for out, x in zip(found, (q, k), strict=True):
        assert torch.equal(out, fusedattn.apply_rotary(x, cos, sin, backend=backend))


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused-qkv": lambda x: torch.cat((x, x, x), -1)[..., : x.shape[-1]],
    "column-stride": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features-first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, interleaved, instruction_set):
    cos, sin = angles(20, 12)
    x, options = normal(2, 5, 12, 30), {"interleaved": interleaved, "backend": "cpu"}
    want = fusedattn.apply_rotary(x, cos, sin, **options)
    assert torch.equal(fusedattn.apply_rotary(LAYOUTS[layout](x), cos, sin, **options), want)
    tables = (LAYOUTS["column-stride"](t) for t in (cos, sin))
    assert torch.equal(fusedattn.apply_rotary(x, *tables, **options), want)
    changed = LAYOUTS[layout](x)
    fusedattn.apply_rotary(changed, cos, sin, inplace=True, **options)
    assert torch.equal(changed, want)


def test_expanded_input(backend):
    cos, sin = angles(20, 8)
    x = normal(2, 1, 12, 16)
    out = fusedattn.apply_rotary(x.expand(2, 4, 12, 16), cos, sin, backend=backend)
    want = fusedattn.apply_rotary(x, cos, sin, backend=backend)
    assert torch.equal(out, want.expand(2, 4, 12, 16))


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8)], ids=str)
def test_empty(shape, backend):
    x = torch.empty(shape, requires_grad=True)
    cos, sin = angles(8, 4)
    assert fusedattn.apply_rotary(x, cos, sin, backend=backend).shape == shape
    q = normal(shape[0], 2, *shape[2:])
    for pair in ((q, x), (x, q)):
        found = fusedattn.apply_rotary_qk(*pair, cos, sin, backend=backend)
        for out, y in zip(found, pair, strict=True):
            assert torch.equal(out, fusedattn.apply_rotary(y, cos, sin, backend=backend))
    fusedattn.apply_rotary(x, cos, sin, backend=backend).sum().backward()
    assert x.grad.shape == shape


def test_position_without_a_row_in_compiled_code(backend):
    """Nothing looks at the positions there: NaN, and no memory outside the tables is read."""
    cos, sin = angles(4, 2)
    positions = torch.tensor([0, 4, -1, 2**62])
    rotate = torch.compile(fusedattn.apply_rotary, backend="aot_eager", fullgraph=True)
    out = rotate(normal(4, 6), cos, sin, positions=positions, backend=backend)
    assert out[1:, :4].isnan().all()
    assert out[0].isfinite().all()
    assert out[:, 4:].isfinite().all()
    torch._dynamo.reset()


X, TABLE = torch.zeros(2, 3, 4, 8), torch.zeros(6, 2)
THREE = TABLE.expand(3, 6, 2)
BAD = {
    "integer": ({"x": X.long()}, TypeError, "x of dtype torch.int64"),
    "no tensor": ({"x": [1.0]}, TypeError, "x of type list"),
    "rank": ({"x": torch.zeros(8)}, ValueError, "at least 2 dimensions"),
    "table dtype": ({"cos": TABLE.long()}, TypeError, "cos of dtype torch.int64"),
    "tables differ": ({"cos": TABLE[:5]}, ValueError, "one shape and one dtype"),
    "table rank": ({"cos": TABLE[0], "sin": TABLE[0]}, ValueError, r"expected \(T, R/2\)"),
    "table batch": ({"cos": THREE, "sin": THREE}, ValueError, "B = 2"),
    "wide": ({"cos": torch.zeros(6, 5), "sin": torch.zeros(6, 5)}, ValueError, "rotary dim of 10"),
    "empty table": ({"cos": TABLE[:0], "sin": TABLE[:0]}, ValueError, "empty tables"),
    "length": ({"offset": 3}, ValueError, "positions 3 to 6, expected 0 to 5"),
    "negative": ({"offset": -1}, ValueError, "positions -1 to 2"),
    "offset": ({"offset": 1.0}, TypeError, "offset of type float"),
    "offset tensor": ({"offset": torch.zeros(2).long()}, ValueError, "expected one number"),
    "offset range": ({"offset": torch.tensor(5)}, ValueError, "positions 5 to 8"),
    "positions dtype": ({"positions": torch.zeros(4)}, TypeError, "positions of dtype"),
    "positions shape": ({"positions": torch.zeros(3).long()}, ValueError, r"\(4,\) or \(2, 4\)"),
    "positions range": ({"positions": torch.tensor([0, 1, 6, 2])}, ValueError, "0 to 6"),
    "positions sign": ({"positions": torch.tensor([0, 1, -2, 2])}, ValueError, "-2 to 2"),
    "device": ({"cos": TABLE.to("meta"), "sin": TABLE.to("meta")}, ValueError, "cos on meta"),
    "positions device": (
        {"positions": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "on meta",
    ),
    "learned table": ({"cos": TABLE.clone().requires_grad_()}, ValueError, "tables without"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fusedattn.apply_rotary(**{"x": X, "cos": TABLE, "sin": TABLE, **changed})


@pytest.mark.parametrize(
    "k", [X.double(), X[:1], X[:, :, :3], X[..., :6]], ids=["dtype", "batch", "length", "head dim"]
)
def test_keys_that_do_not_fit(k):
    with pytest.raises(ValueError, match=r"expected\s+one"):
        fusedattn.apply_rotary_qk(X, k, TABLE, TABLE)
