"""attention_varlen: packed sequences against the oracle of each one by itself."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import fusedattn
import pytest
import torch
from cases.varlen import VarlenCase, check_varlen, one_by_one, packed, regimes
from fusedattn.ops.attention import op
from fusedattn.ops.attention_backends import _cuda_takes
from fusedattn.ops.attention_config import AttentionBackwardCall, AttentionCall
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EDGES = {"lengths_q": (63, 0, 64, 65, 1, 128), "lengths_k": (64, 7, 1, 130, 0, 127)}

REGIMES = regimes(
    ("tile edges, rest", EDGES | {"rest": (3, 2)}),
    ("causal, rest", EDGES | {"causal": True, "rest": (1, 40), "heads": 4, "kv_heads": 2}),
    ("top-left, window", EDGES | {"causal": "top_left", "window": (20, 0)}),
    ("window, softcap", EDGES | {"window": (33, 5), "softcap": 2.0, "rest": (70, 0)}),
    ("slopes of sequences, sinks", EDGES | {"alibi_slopes": "sequences", "sinks": True}),
    (
        "slopes of heads, causal, softcap, rest",
        EDGES | {"alibi_slopes": "heads", "causal": True, "softcap": 3.0, "rest": (2, 2)},
    ),
    ("sinks, window, causal", EDGES | {"sinks": True, "causal": True, "window": (9, None)}),
    (
        "prefill beside decoding, GQA",
        {"lengths_q": (1, 1, 40, 2), "lengths_k": (300, 1, 40, 601), "heads": 4, "kv_heads": 2,
         "causal": True, "dim": 64, "sinks": True},
    ),
    ("scale below 0, Dv", EDGES | {"scale": -0.4, "dim_v": 24}),
    ("one sequence", {"lengths_q": (70,), "causal": True}),
    ("nothing but empty ones", {"lengths_q": (0, 0), "lengths_k": (0, 3), "rest": (4, 1)}),
    ("no sequence", {"lengths_q": (), "rest": (3, 3)}),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("case", REGIMES)
def test_regime(case, dtype, backend):
    if not case.lengths_q:
        made = case.inputs()
        found = packed(made, case, backend)
        assert all(torch.equal(x, torch.zeros_like(x)) for n, x in found.items() if n != "lse")
        assert found["lse"].isneginf().all()
        return
    found = check_varlen(dataclasses.replace(case, dtype=dtype), backend)
    end_q, end_k = sum(case.lengths_q), sum(case.lengths_k or case.lengths_q)
    for name, end in (("out", end_q), ("dq", end_q), ("dk", end_k), ("dv", end_k)):
        assert torch.equal(found[name][end:], torch.zeros_like(found[name][end:])), name
    assert found["lse"][:, end_q:].isneginf().all()


TRITON = {
    "window, slopes of sequences, sinks, GQA": VarlenCase(
        (33, 0, 5), (40, 7, 0), (3, 2), kv_heads=1, window=(30, 6), alibi_slopes="sequences",
        sinks=True,
    ),
    "fp16, causal, slopes of heads": VarlenCase(
        (32, 1, 17), (16, 40, 20), (0, 5), causal=True, alibi_slopes="heads", dtype=F16
    ),
    "bf16, top-left": VarlenCase((35, 1, 1, 20), (20, 1, 2, 35), causal="top_left", dtype=BF16),
}  # fmt: skip


@pytest.mark.parametrize("case", TRITON.values(), ids=TRITON)
def test_triton(case):
    pytest.importorskip("triton")
    check_varlen(case, "triton")


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("case", [x for x in REGIMES if x.values[0].lengths_q])
def test_each_sequence_as_alone(case, dtype, instruction_set):
    """Bit for bit; amx alone picks its kernel by the size of the whole call."""
    if instruction_set == "amx":
        pytest.skip("small calls go to other kernels")
    case = dataclasses.replace(case, dtype=dtype)
    made = case.inputs()
    given = {name: x for name, x in made.items() if not name.startswith("d")} | case.options()
    found = fusedattn.attention_varlen(**given, return_lse=True, backend="cpu")
    attend = functools.partial(fusedattn.attention, return_lse=True, backend="cpu")
    for x, want in zip(found, one_by_one(attend, **given), strict=True):
        assert torch.equal(x, want)


def test_gradients_are_the_same_each_time_and_stay_in_their_sequence():
    """NaN in one sequence's rows shows in no other's; gradients are bitwise repeatable."""
    case = VarlenCase(lengths_q=(70, 40, 33), heads=4, kv_heads=2, causal=True, sinks=True)
    made = case.inputs()
    want = packed(made, case, "cpu")
    again = packed(made, case, "cpu")
    for x in ("q", "k", "v", "dout"):
        made[x][70:110] = float("nan")
    found = packed(made, case, "cpu")
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(again[name], want[name])
        for rows in (slice(70), slice(110, None)):
            assert torch.equal(found[name][rows], want[name][rows]), name


# --- offsets that are wrong, where nobody looks ---------------------------------------------------

HOSTILE = [(5, 2, 9), (-3, 4, 40), (7, 7, 2), (2**30, -(2**30), 2**31 - 1), (0, 100, 3)]


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_wrong_offsets_stay_inside(offsets, backend):
    """Kernels neither read nor write beyond their tensors, which lie in larger ones."""
    spaces = [torch.full((64, 2, 16), 7.0) for _ in range(8)]
    q, k, v, out, dout, dq, dk, dv = (x[20:30].transpose(0, 1)[None] for x in spaces)
    lse = torch.full((3, 2, 10), 7.0)
    for x in (q, k, v, dout):
        x.normal_()
    cu = torch.tensor(offsets, dtype=torch.int32)
    call = AttentionCall(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu.flip(0))
    kernels = op.kernels(backend)
    kernels.forward(call, out, lse[1:2])
    backward = AttentionBackwardCall(dout, None, out, lse[1:2], *call[:-1], config=call.config)
    kernels.backward(backward, dq, dk, dv, None, None, None)
    for x in spaces:
        assert (x[:20] == 7).all()
        assert (x[30:] == 7).all()
    assert (lse[0] == 7).all()
    assert (lse[2] == 7).all()


# --- derivatives and transforms -------------------------------------------------------------------


def leaves(dtype: torch.dtype = F64, n: int = 9) -> list[Tensor]:
    return [torch.randn(n, h, 3, dtype=dtype, requires_grad=True) for h in (2, 1, 1)]


CU_Q = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
CU_K = torch.tensor([0, 2, 4, 8])


def attend(q, k, v, slopes=None, sinks=None, **options):
    return fusedattn.attention_varlen(
        q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=True, alibi_slopes=slopes,
        sinks=sinks, **options,
    )  # fmt: skip


@pytest.mark.parametrize("slopes", [(2,), (3, 2)], ids=str)
def test_gradcheck_of_the_kernel(slopes):
    given = [*leaves(), *(torch.rand(s, dtype=F64, requires_grad=True) for s in (slopes, (2,)))]

    def function(*x):
        out, lse = attend(*x, softcap=2.0, return_lse=True)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_second_derivatives_of_one_history():
    x = torch.randn(9, 1, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: attend(x, x.sin(), x).square(), x)


def test_transforms():
    q, k, v = (x.detach() for x in leaves())
    tangent = torch.randn_like(q)
    _, found = torch.func.jvp(lambda q: attend(q, k, v), (q,), (tangent,))
    want = torch.autograd.functional.jvp(lambda q: attend(q, k, v), q, tangent)[1]
    torch.testing.assert_close(found, want)
    batch = torch.randn(2, *q.shape, dtype=F64)
    found = torch.vmap(lambda q: attend(q, k, v))(batch)
    torch.testing.assert_close(found, torch.stack([attend(x, k, v) for x in batch]))


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """In one graph, the same tensor as both offsets; other totals and numbers of sequences."""
    torch._dynamo.reset()

    def function(q, k, v, cu):
        out, lse = fusedattn.attention_varlen(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, return_lse=True
        )
        return out.square().sum() + lse.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    first = (9, [0, 2, 2, 4, 9])
    totals = (first, (12, [0, 5, 6, 12]), (20, [0, 20])) if dynamic else (first,)
    with mock.patch("torch._dynamo.config.error_on_recompile", dynamic):
        for total, offsets in totals:
            x, cu = leaves(F32, total), torch.tensor(offsets, dtype=torch.int32)
            found = torch.autograd.grad(compiled(*x, cu), x)
            for a, b in zip(found, torch.autograd.grad(function(*x, cu), x), strict=True):
                torch.testing.assert_close(a, b)


def test_export_with_dynamic_shapes():
    class Block(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return fusedattn.attention_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)

    rows, number = torch.export.Dim("rows", min=2), torch.export.Dim("number", min=2)
    x, cu = [y.detach() for y in leaves(F32)], torch.tensor([0, 4, 9], dtype=torch.int32)
    shapes = (*[{0: rows}] * 3, {0: number})
    program = torch.export.export(Block(), (*x, cu), dynamic_shapes=shapes).module()
    y, cu = [y.detach() for y in leaves(F32, 13)], torch.tensor([0, 4, 4, 12], dtype=torch.int32)
    assert torch.equal(program(*y, cu), Block()(*y, cu))
    with pytest.raises(ValueError, match=r"got cu_seqlens_q = \[0, 14\], expected"):
        program(*y, torch.tensor([0, 14], dtype=torch.int32))


def test_opcheck_autocast_and_flops():
    x = leaves(F32)
    views = [y.transpose(0, 1)[None] for y in x]
    call = AttentionCall(*views, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)
    torch.library.opcheck(
        torch.ops.fusedattn.attention_fwd.default, (*call[:-1], "auto", *call.config)
    )
    with torch.autocast("cpu", BF16):
        out = attend(*x)
    assert out.dtype == BF16
    assert torch.equal(out, attend(*(y.bfloat16() for y in x)))
    for options, keys in (({}, 9), ({"max_seqlen_k": 4}, 4)):
        with FlopCounterMode(display=False) as counter:
            attend(*x, **options)
        assert counter.get_total_flops() == 2 * 2 * 9 * keys * (3 + 3)


def test_jagged_tensors():
    """In and out as `F.scaled_dot_product_attention` takes them, with gradients."""
    rows = leaves(F32)
    cu = CU_K  # of k and v; q has as many sequences
    x = [
        torch.nested.nested_tensor_from_jagged(y[:end], offsets).transpose(1, 2)
        for y, offsets, end in zip(rows, (CU_Q.long(), cu, cu), (7, 8, 8), strict=True)
    ]
    out, lse = fusedattn.attention(*x, causal=True, return_lse=True)
    want, want_lse = attend(rows[0][:7], *(y[:8] for y in rows[1:]), return_lse=True)
    assert out.shape[:2] == (3, 2)
    assert torch.equal(out.transpose(1, 2).values(), want)
    assert torch.equal(lse.transpose(1, 2).values(), want_lse.transpose(0, 1))
    found = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), rows)
    for a, b in zip(found, torch.autograd.grad(want.square().sum(), rows), strict=True):
        assert torch.equal(a, b)
    for options, message in (
        ({"mask": torch.ones(1, dtype=torch.bool)}, "got mask with nested q"),
        ({"q": x[0].transpose(1, 2)}, "got q that is not jagged"),
        ({"v": rows[2]}, "got v that is not jagged"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedattn.attention(**dict(zip("qkv", x, strict=True)) | options)


def test_explain_names_what_refuses():
    x = [y.detach().bfloat16() for y in leaves(n=9)]
    text = fusedattn.explain(attend, *x)
    assert text.startswith("attention: cpu\n")
    views = [torch.zeros(1, h, 9, 8, dtype=BF16) for h in (2, 1, 1)]
    call = AttentionCall(*views, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)
    assert _cuda_takes(call) is None


BAD = {
    "q of two dimensions": ({"q": torch.ones(9, 3)}, ValueError, "q of shape"),
    "v of another length": ({"v": torch.ones(8, 1, 3)}, ValueError, "v of shape"),
    "float offsets": ({"cu_seqlens_q": CU_Q.float()}, TypeError, "cu_seqlens_q of dtype"),
    "no offsets": ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k of type NoneType"),
    "offsets of two dimensions": ({"cu_seqlens_q": CU_Q[None]}, ValueError, "cu_seqlens_q of sha"),
    "no first offset": ({"cu_seqlens_q": CU_Q[:0]}, ValueError, "cu_seqlens_q of shape"),
    "another number": ({"cu_seqlens_k": CU_K[:3]}, ValueError, "cu_seqlens_q of 3 sequences"),
    "not from 0": ({"cu_seqlens_k": CU_K + 1}, ValueError, r"cu_seqlens_k = \[1, 3, 5, 9\]"),
    "falling": ({"cu_seqlens_q": CU_Q[[0, 2, 3, 1]]}, ValueError, "cu_seqlens_q = "),
    "past the rows": ({"cu_seqlens_k": CU_K * 2}, ValueError, "at most 9, the rows of k"),
    "on another device": ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, "cu_seqlens_q on meta"),
    "slopes of another number": ({"alibi_slopes": torch.ones(2, 2)}, ValueError, "alibi_slopes"),
    "a length below 0": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1"),
    "a length that is none": ({"max_seqlen_k": 2.5}, TypeError, "max_seqlen_k of type float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changed, error, message = BAD[name]
    given = dict(zip("qkv", (x.detach() for x in leaves(F32)), strict=True))
    given |= {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K} | changed
    with pytest.raises(error, match=message):
        fusedattn.attention_varlen(**given)
