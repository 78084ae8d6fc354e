"""Masks and biases by rule, scales of heads: against the same written out, and around torch."""

from __future__ import annotations

import copy
import re
from typing import Any

import fusedattn
import pytest
import torch
from cases.rules import RuleCase, check_rules, distance_of
from fusedattn import biases, masks
from fusedattn.ops.attention import op
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

REGIMES = {
    "t5, tile edges": {"rules": ("t5",), "seq_q": 129, "seq_k": 257, "batch": 3},
    "t5, causal, softcap, lengths": {
        "rules": ("t5",), "seq_q": 70, "causal": True, "softcap": 3.0, "kv_lengths": (70, 31),
    },
    "t5 decoder, causal, more keys": {
        "rules": ("t5 decoder",), "seq_q": 33, "seq_k": 150, "causal": True, "kv_heads": 1,
    },
    "relative, window, slopes, sinks": {
        "rules": ("relative",), "seq_q": 140, "seq_k": 97, "window": (40, 30),
        "alibi_slopes": (2,), "sinks": True,
    },
    "relative, dropout, one query": {"rules": ("relative",), "seq_q": 1, "seq_k": 300,
                                     "dropout_p": 0.2},
    "documents": {"rules": ("documents",), "seq_q": 200, "seq_k": 150, "batch": 2},
    "documents, causal, GQA": {"rules": ("documents",), "seq_q": 130, "causal": True,
                               "heads": 4, "kv_heads": 2},
    "prefix": {"rules": ("prefix",), "seq_q": 130, "seq_k": 170, "batch": 3},
    "prefix, window, bias": {"rules": ("prefix",), "seq_q": 100, "window": (50, 20),
                             "bias": (2, 1, 100, 100)},
    "blocks": {"rules": ("blocks",), "seq_q": 210, "seq_k": 170},
    "small blocks, lengths": {"rules": ("blocks",), "seq_q": 70, "size": 5,
                              "kv_lengths": (61, 9)},
    "all of them, dense, t5": {
        "rules": ("t5", "documents", "prefix", "blocks"), "seq_q": 150, "mask": (2, 1, 1, 150),
    },
}  # fmt: skip


def named(regimes: dict[str, dict], *names: str, **common: Any) -> list:
    return [
        pytest.param(RuleCase(**regimes[name] | common), id=name.replace(" ", "_"))
        for name in names or regimes
    ]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, dtype: torch.dtype, backend: str) -> None:
    check_rules(RuleCase(**REGIMES[regime], dtype=dtype), backend)


SMALL = {
    "t5, kv lengths, causal, bf16": {
        "rules": ("t5",), "seq_q": 40, "seq_k": 70, "causal": True, "dtype": BF16,
        "kv_lengths": (70, 31),
    },
    "relative, window, prefix": {"rules": ("relative", "prefix"), "seq_q": 50, "seq_k": 35,
                                 "window": (30, 20), "kv_heads": 1},
    "documents, blocks, fp16": {"rules": ("documents", "blocks"), "seq_q": 80, "size": 24,
                                "dtype": F16},
    "blocks, dense": {"rules": ("blocks",), "seq_q": 40, "size": 7, "mask": (2, 1, 1, 40)},
}  # fmt: skip


@pytest.mark.parametrize("case", named(SMALL))
def test_triton(case: RuleCase) -> None:
    pytest.importorskip("triton")
    check_rules(case, "triton")


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]


def test_second_derivatives_of_a_table() -> None:
    """Also where the table and the scores share a history."""
    x, table = leaves((1, 2, 5, 4), (8, 2))

    def attend(x: Tensor, table: Tensor) -> Tensor:
        shifted = table + x.sum() / 100
        bias = biases.t5(shifted, bidirectional=True, max_distance=4)
        return fusedattn.attention(x, x.sin(), x.cos(), bias=bias, causal=True).square()

    assert torch.autograd.gradcheck(attend, (x, table))
    assert torch.autograd.gradgradcheck(attend, (x, table))


@pytest.mark.parametrize("shape", [(3,), ()], ids=["heads", "one"])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_tensor_as_scale(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also below 0 and 0; the gradient is that of q · scale."""
    q, k, v, scale = leaves((2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8), shape)
    with torch.no_grad():
        scale.view(-1)[:2] *= -1
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    scale = scale.detach().to(F64 if dtype == F64 else F32).requires_grad_()
    given = scale if not shape else scale[:, None, None]
    found = fusedattn.attention(q, k, v, scale=scale, causal=True)
    want = fusedattn.attention((q * given).to(dtype), k, v, scale=1.0, causal=True)
    assert torch.equal(found, want)
    weights = torch.linspace(-1, 1, found.numel(), dtype=dtype).view_as(found)
    for x, y in zip(
        *(torch.autograd.grad((o * weights).sum(), (q, k, v, scale)) for o in (found, want)),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_a_tensor_as_scale_of_packed_and_nested() -> None:
    q, k, v, scale = leaves((9, 3, 8), (9, 3, 8), (9, 3, 8), (3,))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    found = fusedattn.attention_varlen(q, k, v, **packed, scale=scale)
    each = [
        fusedattn.attention(*(x[None, a:b].transpose(1, 2) for x in (q, k, v)), scale=scale)
        for a, b in ((0, 4), (4, 9))
    ]
    assert torch.equal(found, torch.cat([x[0].transpose(0, 1) for x in each]))
    jagged = [
        torch.nested.nested_tensor_from_jagged(x.detach(), offsets).transpose(1, 2)
        for x in (q, k, v)
    ]
    nested = fusedattn.attention(*jagged, scale=scale)
    assert torch.equal(nested.transpose(1, 2).values(), found)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.backends("cpu", "reference", "triton")
def test_packed_rules_are_those_of_each_sequence(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == F64:
        pytest.skip("takes no float64")
    lengths_q, lengths_k = (70, 0, 1, 21), (70, 3, 30, 10)
    q, k, v, table = leaves((94, 4, 16), (115, 2, 16), (115, 2, 16), (17, 4), dtype=dtype)
    prefix = torch.tensor([35, 2, 0, 12])
    cu_q, cu_k = (torch.tensor((0, *x)).cumsum(0).int() for x in (lengths_q, lengths_k))
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "mask": masks.prefix(prefix)}
    own = {"bias": biases.relative(table), "return_lse": True, "backend": backend}
    out, lse = fusedattn.attention_varlen(q, k, v, **packed, **own)
    if backend == "triton":  # interpreted
        own["backend"] = "reference"
    outs, lses = [], []
    for b in range(4):
        rows = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        parts = (x[None, r].transpose(1, 2) for x, r in ((q, rows[0]), (k, rows[1]), (v, rows[1])))
        one = fusedattn.attention(*parts, mask=masks.prefix(prefix[b : b + 1]), **own)
        outs.append(one[0][0].transpose(0, 1))
        lses.append(one[1][0])
    want, want_lse = torch.cat(outs), torch.cat(lses, 1)
    close = {"rtol": 0, "atol": 1e-12 if dtype == F64 else 1e-5}
    torch.testing.assert_close(out[:92], want, **close)
    torch.testing.assert_close(lse[:, :92], want_lse, **close)
    weights = torch.linspace(-1, 1, want.numel(), dtype=dtype).view_as(want)
    total, total_want = (out[:92] * weights).sum(), (want * weights).sum()
    grads = (torch.autograd.grad(x, (q, k, v, table)) for x in (total, total_want))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=10 * close["atol"])


def test_a_block_mask_of_flex_attention(backend: str) -> None:
    """By conversion: whole blocks, those seen in part, and lengths that are no multiple."""
    if backend == "cuda_emulated":
        pytest.skip("takes no masks")

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i - j < 90) & ((j + h) % 7 != 0)

    given = create_block_mask(seen, None, 2, 150, 150, device="cpu", BLOCK_SIZE=(64, 32))
    h, i, j = torch.arange(2)[:, None, None], torch.arange(150)[:, None], torch.arange(150)
    q, k, v = leaves((2, 2, 150, 16), (2, 2, 150, 16), (2, 2, 150, 16), dtype=F32)
    found = fusedattn.attention(q, k, v, mask=given, backend=backend)
    want = fusedattn.attention(q, k, v, mask=seen(0, h, i, j)[None], backend=backend)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"BlockMask for lengths \(150, 150\).*\(149, 150\)"):
        fusedattn.attention(q[:, :, 1:], k, v, mask=given)


def test_masks_combine_with_tensors_from_both_sides() -> None:
    q, k, v = (x.detach() for x in leaves((1, 1, 9, 4), (1, 1, 9, 4), (1, 1, 9, 4)))
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2], dtype=torch.int32)
    other = torch.tensor([0, 0, 5, 5, 5, 5, 5, 5, 0], dtype=torch.int32)
    dense = torch.ones(9, 9, dtype=torch.bool).tril()
    both = (ids[:, None] == ids) & (other[:, None] == other) & dense
    coarse, fine = torch.eye(2, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    both = both & coarse.repeat_interleave(6, 0).repeat_interleave(6, 1)[:9, :9]
    want = fusedattn.attention(q, k, v, mask=both)
    rule = masks.documents(ids) & masks.documents(other)
    rule = rule & masks.blocks(coarse, 6)
    for mask in (rule & dense, dense & rule, rule & masks.Mask(dense=dense)):
        assert torch.equal(fusedattn.attention(q, k, v, mask=mask), want)
    assert masks.blocks(coarse, 6).__and__(masks.blocks(fine, 4)).block_size == 2
    with pytest.raises(TypeError):
        rule & 3  # type: ignore[operator]


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "table", "bias", "slopes", "bias q"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_only_what_requires_a_gradient_is_computed(
    wanted: str, packed: bool, any_backend: str
) -> None:
    """The rest is not even asked of the kernels, and what is wanted is the same as with all."""
    if any_backend == "cuda_emulated" and wanted in ("table", "bias", "slopes", "bias q"):
        pytest.skip("takes no bias")
    half = any_backend == "cuda_emulated"
    heads, rows = (2, 40) if packed else (2, 30)
    of_rows = (rows, heads, 16) if packed else (2, heads, rows, 16)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys("qkv", of_rows)
    shapes |= {"table": (9, heads), "bias": (2, heads, rows, rows), "slopes": (heads,)}
    if packed and "bias" in wanted:
        pytest.skip("no bias of pairs")
    made = dict(zip(shapes, leaves(*shapes.values(), dtype=BF16 if half else F32), strict=True))
    names = wanted.split() if " " in wanted else list(wanted) if len(wanted) < 3 else [wanted]
    used = {*"qkv", *names}

    def gradients(required: set[str]) -> dict[str, Tensor]:
        x = {n: y.detach().requires_grad_(n in required) for n, y in made.items() if n in used}
        options: dict[str, Any] = {"backend": any_backend, "causal": True}
        if "table" in x:
            options["bias"] = biases.relative(x["table"])
        if "bias" in x:
            options["bias"] = x["bias"]
        if "slopes" in x:
            options["alibi_slopes"] = x["slopes"]
        if packed:
            offsets = torch.tensor([0, 17, 40], dtype=torch.int32)
            options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
            out = fusedattn.attention_varlen(x["q"], x["k"], x["v"], **options)
        else:
            out = fusedattn.attention(x["q"], x["k"], x["v"], **options)
        out.float().square().sum().backward()
        return {n: y.grad for n, y in x.items() if n in names}

    calls = []
    run = op.backward.library._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            op.backward.library,
            "_run",
            lambda call, kernels: calls.append(call) or run(call, kernels),
        )
        alone = gradients(set(names))
    asked = {name: getattr(calls[0], f"{name}_grad") for name in "qkv"}
    assert asked == {name: name in names for name in "qkv"}
    for name, want in gradients(used).items():
        torch.testing.assert_close(alone[name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_under_compile_export_autocast_and_copies() -> None:
    q, k, v, table, scale = leaves(*[(1, 2, 20, 8)] * 3, (8, 2), (2,), dtype=F32)
    ids = torch.arange(20) // 6

    def attend(q: Tensor, table: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        bias = biases.t5(table, bidirectional=True, max_distance=10)
        mask = masks.documents(ids) & masks.prefix(ids[:1] + 3)
        return fusedattn.attention(q, k, v, bias=bias, mask=mask, scale=scale)

    def gradients(run: Any) -> list[Tensor]:
        out = run(q, table, scale, ids)
        return [out, *torch.autograd.grad(out.square().sum(), (q, table, scale))]

    want = gradients(attend)
    compiled = torch.compile(attend, fullgraph=True)
    for x, y in zip(gradients(compiled), want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, bias: Any, mask: Any) -> Tensor:
            return fusedattn.attention(q, k.detach(), v.detach(), bias=bias, mask=mask)

    given = (q.detach(), biases.relative(table.detach()[:7]), masks.documents(ids))
    exported = torch.export.export(Module(), given).module()
    assert torch.equal(exported(*given), Module()(*given))
    copied = copy.deepcopy(given)
    assert torch.equal(Module()(*copied), Module()(*given))
    with torch.autocast("cpu", torch.bfloat16):
        half = attend(q, table, scale, ids)
    assert half.dtype == BF16
    torch.testing.assert_close(half.float(), want[0], rtol=0, atol=0.05)


def test_t5_buckets_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3000)
    for bidirectional in (True, False):
        rule = biases.t5(torch.zeros(32, 1), bidirectional=bidirectional)
        want = transformers.T5Attention._relative_position_bucket(
            distance, bidirectional=bidirectional, num_buckets=32, max_distance=128
        )
        assert torch.equal(rule.buckets(distance), want)


TABLE = torch.zeros(32, 4)
QKV = [torch.zeros(2, 4, 6, 8) for _ in range(3)]
BAD = {
    "a table of other heads": (
        lambda: {"bias": biases.t5(TABLE[:, :3], bidirectional=True)}, ValueError,
        "got bias with a table of shape (32, 3), expected (buckets, Hq) with Hq = 4",
    ),
    "no table": (lambda: biases.relative(TABLE[0]), ValueError, "table of shape (4,)"),
    "a table of ints": (lambda: biases.relative(TABLE.int()), TypeError, "got table of dtype"),
    "odd buckets": (
        lambda: biases.t5(TABLE[:31], bidirectional=True), ValueError, "an even number of at least",
    ),
    "even rows": (lambda: biases.relative(TABLE), ValueError, "an odd number of rows"),
    "too near": (
        lambda: biases.t5(TABLE, bidirectional=True, max_distance=8), ValueError,
        "got max_distance=8, expected more than 8",
    ),
    "ids of another length": (
        lambda: {"mask": masks.documents(torch.zeros(7, dtype=torch.int32))}, ValueError,
        "documents_q of shape (1, 7), expected (6,) or (2, 6)",
    ),
    "ids of floats": (lambda: masks.documents(torch.zeros(6)), TypeError, "got ids of dtype"),
    "ids of two dtypes": (
        lambda: {"mask": masks.documents(torch.zeros(6).int(), torch.zeros(6).long())}, TypeError,
        "got documents of dtypes torch.int32 and torch.int64",
    ),
    "int64 ids combined": (
        lambda: masks.documents(torch.zeros(6).long()) & masks.documents(torch.zeros(6).long()),
        TypeError, "expected int32",
    ),
    "lengths of another batch": (
        lambda: {"mask": masks.prefix(torch.zeros(3).int())}, ValueError, "expected (2,)",
    ),
    "lengths of two dimensions": (
        lambda: masks.prefix(torch.zeros(2, 1).int()), ValueError, "expected (B,)",
    ),
    "blocks of floats": (lambda: masks.blocks(torch.zeros(1, 1), 8), TypeError, "expected a dense"),
    "blocks of size 0": (
        lambda: masks.blocks(torch.ones(1, 1).bool(), 0), ValueError, "got size=0",
    ),
    "too few blocks": (
        lambda: {"mask": masks.blocks(torch.ones(1, 2).bool(), 3)}, ValueError,
        "masks.blocks of shape (1, 1, 1, 2) and size 3, expected (2, 4, 2, 2)",
    ),
    "a scale of other heads": (
        lambda: {"scale": torch.ones(3)}, ValueError,
        "got scale of shape (3,), expected a float, () or (Hq,) = (4,)",
    ),
    "a scale of ints": (lambda: {"scale": torch.ones(4).int()}, TypeError, "got scale of dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        fusedattn.attention(*QKV, **make())


def test_packed_sequences_take_no_dense_rules() -> None:
    rows, offsets = torch.zeros(6, 4, 8), torch.tensor([0, 6])
    given: dict[str, Any] = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    with pytest.raises(TypeError, match=r"got mask of type Mask, expected None or masks\.prefix"):
        fusedattn.attention_varlen(
            rows, rows, rows, **given, mask=masks.documents(torch.zeros(6).int())
        )
    with pytest.raises(TypeError, match="got bias of type Tensor"):
        fusedattn.attention_varlen(rows, rows, rows, **given, bias=torch.zeros(6, 6))


def test_distances_count_from_the_last_query_and_key() -> None:
    table = torch.arange(9.0)[:, None]
    bias = biases.relative(table).along(3, 4, torch.float32)
    assert bias.shape == (1, 1, 1, 6)
    for i in range(3):
        for j in range(4):
            assert bias[0, 0, 0, j - i + 2] == 4 + distance_of(3, 4)[i, j]
