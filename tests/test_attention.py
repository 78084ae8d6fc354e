"""Attention and its gradients against the fp64 oracle, regime by regime, on every backend."""

from __future__ import annotations

import dataclasses

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, check_attention, fused, regimes
from cases.drawn import drawn_cases
from cases.rules import check_rules
from compare import check, device_for
from fusedattn.reference import functional as reference
from hypothesis import given

pytestmark = pytest.mark.backends("fast", "cuda_emulated")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [F16, BF16, F32, F64]
BOTH = ("out", "lse")

KINDS = regimes(
    ("full", {"seq_q": 80}),
    ("causal", {"seq_q": 80, "causal": True}),
    ("top-left, Sq < Sk", {"seq_q": 30, "seq_k": 70, "causal": "top_left"}),
    ("top-left, Sq > Sk", {"seq_q": 70, "seq_k": 30, "causal": "top_left"}),
    ("bottom-right, Sq < Sk", {"seq_q": 30, "seq_k": 70, "causal": "bottom_right"}),
    ("bottom-right, rows that see nothing", {"seq_q": 70, "seq_k": 30, "causal": True}),
    ("cross", {"seq_q": 19, "seq_k": 77}),
    ("GQA", {"heads": 6, "kv_heads": 2, "seq_q": 40, "causal": True}),
    ("MQA", {"heads": 4, "kv_heads": 1, "seq_q": 40}),
    ("kv_lengths, one empty", {"batch": 3, "seq_q": 40, "kv_lengths": (40, 0, 17)}),
    ("kv_lengths + causal", {"seq_q": 20, "seq_k": 50, "causal": True, "kv_lengths": (33, 50)}),
    ("window", {"seq_q": 80, "window": (20, 7)}),
    (
        "window, causal, GQA",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 300,
            "window": (33, None),
            "causal": True,
            "grads": BOTH,
        },
    ),
    ("window, Sq < Sk", {"seq_q": 30, "seq_k": 170, "window": (12, 0)}),
    (
        "window, top-left, Sq > Sk",
        {"seq_q": 170, "seq_k": 30, "causal": "top_left", "window": (9, 4)},
    ),
    ("window to the right", {"seq_q": 40, "seq_k": 70, "window": (None, 3)}),
    ("window of one key", {"seq_q": 200, "seq_k": 300, "window": (0, 0), "grads": BOTH}),
    ("window wider than all", {"seq_q": 40, "window": (1 << 62, 1 << 62)}),
    (
        "window + decoding",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 2,
            "seq_k": 900,
            "window": (600, 0),
            "kv_lengths": (900, 500),
        },
    ),
    (
        "window + mask + bias + softcap + kv_lengths",
        {
            "seq_q": 45,
            "seq_k": 67,
            "window": (20, 2),
            "mask": (2, 1, 45, 67),
            "softcap": 2.0,
            "bias": (1, 2, 45, 67),
            "kv_lengths": (60, 5),
            "grads": BOTH,
        },
    ),
    ("window + shared bias", {"seq_q": 150, "window": (30, 10), "bias": (1, 1, 1, 150)}),
    ("alibi", {"seq_q": 80, "alibi_slopes": (2,), "causal": True, "grads": BOTH}),
    (
        "alibi, Sq < Sk, GQA",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 30,
            "seq_k": 170,
            "alibi_slopes": (2, 4),
            "window": (100, 20),
        },
    ),
    (
        "alibi + top-left + softcap + bias",
        {
            "seq_q": 45,
            "seq_k": 67,
            "alibi_slopes": (2,),
            "causal": "top_left",
            "softcap": 2.0,
            "bias": (1, 2, 45, 67),
            "grads": BOTH,
        },
    ),
    (
        "sinks",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 80,
            "sinks": True,
            "causal": True,
            "window": (20, 0),
            "grads": BOTH,
        },
    ),
    (
        "sinks, rows that see nothing",
        {"batch": 3, "seq_q": 40, "sinks": True, "kv_lengths": (40, 0, 17), "grads": BOTH},
    ),
    ("sinks, large scores", {"scale": 8.0, "seq_q": 40, "sinks": True}),
    (
        "alibi + sinks + decoding",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 2,
            "seq_k": 900,
            "alibi_slopes": (2, 4),
            "sinks": True,
            "causal": True,
        },
    ),
    ("dropout", {"seq_q": 80, "seq_k": 150, "dropout_p": 0.3, "grads": BOTH}),
    (
        "dropout + all that changes scores + GQA",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 45,
            "seq_k": 167,
            "causal": True,
            "window": (130, None),
            "softcap": 2.0,
            "mask": (2, 1, 45, 167),
            "bias": (1, 4, 1, 167),
            "alibi_slopes": (4,),
            "sinks": True,
            "kv_lengths": (160, 90),
            "dropout_p": 0.6,
            "grads": BOTH,
        },
    ),
    (
        "dropout + decoding",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 2,
            "seq_k": 900,
            "window": (602, 0),
            "kv_lengths": (899, 501),
            "dropout_p": 0.4,
        },
    ),
    ("LSE gradient alone", {"seq_q": 40, "causal": True, "grads": ("lse",)}),
    ("out and LSE gradients", {"heads": 4, "kv_heads": 2, "seq_q": 50, "grads": BOTH}),
    ("scale 0", {"scale": 0.0}),
    ("scale negative", {"scale": -0.3, "causal": True}),
    ("scale large", {"scale": 8.0, "seq_q": 40}),
    ("softcap", {"softcap": 1.5, "seq_q": 70, "causal": True, "grads": BOTH}),
    ("softcap of large scores", {"softcap": 30.0, "scale": 8.0, "seq_q": 40}),
    ("softcap + a few queries", {"softcap": 2.0, "seq_q": 3, "seq_k": 300, "kv_lengths": (290, 7)}),
    (
        "mask + bias + causal + kv_lengths + GQA",
        {
            "heads": 4,
            "kv_heads": 2,
            "seq_q": 45,
            "seq_k": 67,
            "causal": True,
            "mask": (2, 1, 45, 67),
            "bias": (1, 4, 45, 67),
            "kv_lengths": (60, 5),
            "grads": BOTH,
        },
    ),
    (
        "softcap + mask + bias",
        {"softcap": 1.0, "scale": -0.7, "mask": (2, 1, 32, 32), "bias": (2, 2, 32, 32)},
    ),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", KINDS)
def test_kind(case, dtype, backend):
    check_attention(dataclasses.replace(case, dtype=dtype), backend)


HEAD_DIMS = regimes(
    *((f"head dim {dim}", {"dim": dim, "seq_q": 37, "causal": True, "grads": BOTH})
      for dim in (1, 3, 8, 24, 64, 72, 80, 128, 130, 160, 256, 257)),
    *((f"Dv {dim_v} under D {dim}", {"dim": dim, "dim_v": dim_v, "seq_q": 37, "heads": 4,
                                     "kv_heads": 2})
      for dim, dim_v in ((64, 32), (32, 64), (192, 128), (128, 192))),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("case", HEAD_DIMS)
def test_head_dim(case, dtype, backend):
    check_attention(dataclasses.replace(case, dtype=dtype), backend)


# Each length is below, at or above a power of two that a kernel may tile by; they are sampled in
# pairs with the options that have a tail of their own, not crossed.
LENGTHS = regimes(
    ("one query, one key", {"seq_q": 1, "grads": BOTH}),
    ("two", {"seq_q": 2, "causal": True, "bias": (2, 2, 2, 2)}),
    ("below 16", {"seq_q": 15, "causal": True}),
    ("above 16", {"seq_q": 17, "mask": (2, 2, 17, 17)}),
    ("below 32", {"seq_q": 31, "causal": True, "bias": (1, 2, 31, 31)}),
    ("above 32", {"seq_q": 33, "causal": True, "bias": (1, 2, 33, 33)}),
    ("below 64", {"seq_q": 63, "bias": (2, 1, 63, 63)}),
    ("above 64", {"seq_q": 65, "causal": True, "mask": (1, 2, 65, 65)}),
    ("below 128", {"seq_q": 127, "causal": True}),
    ("above 128", {"seq_q": 129, "bias": (1, 1, 129, 129), "causal": True}),
    ("above 256", {"seq_q": 257, "causal": True, "dim": 64}),
    ("one query, 257 keys", {"seq_q": 1, "seq_k": 257}),
    ("257 queries, one key", {"seq_q": 257, "seq_k": 1, "grads": BOTH}),
    ("17 queries, 127 keys", {"seq_q": 17, "seq_k": 127, "causal": "top_left"}),
    ("above 1024", {"batch": 1, "seq_q": 1025, "causal": True, "bias": (1025, 1025)}),
)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("case", LENGTHS)
def test_length(case, dtype, backend):
    check_attention(dataclasses.replace(case, dtype=dtype), backend)


BROADCASTS = [
    (2, 4, 21, 35), (1, 4, 21, 35), (2, 1, 21, 35), (1, 1, 21, 35), (2, 4, 1, 35), (2, 4, 21, 1),
    (1, 4, 1, 1), (2, 1, 1, 35), (4, 21, 35), (21, 35), (35,), (1,), (),
]  # fmt: skip
BROADCAST = {"heads": 4, "kv_heads": 2, "seq_q": 21, "seq_k": 35, "grads": BOTH}


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_mask_broadcast(shape, backend):
    check_attention(AttentionCase(**BROADCAST, mask=shape), backend)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F64, F64)]
)
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_bias_broadcast_and_its_gradient(shape, dtype, bias_dtype, backend):
    case = AttentionCase(**BROADCAST, bias=shape, dtype=dtype, bias_dtype=bias_dtype, causal=True)
    found = check_attention(case, backend)
    assert found["dbias"].shape == shape
    assert found["dbias"].dtype == bias_dtype


def test_float32_bias_of_bf16_queries_is_not_rounded(backend):
    """A constant moves no probability; rounding 256 + x to bf16 would lose all of x."""
    case = AttentionCase(dtype=BF16, seq_q=24, bias=(2, 2, 24, 24), bias_dtype=F32)
    made = case.inputs(device_for(backend))
    q, k, v, bias = (made[name] for name in ("q", "k", "v", "bias"))
    out = fusedattn.attention(q, k, v, bias=bias + 256, backend=backend)
    want, _ = reference.attention(*(x.double() for x in (q, k, v)), bias=(bias + 256).double())
    eager, _ = reference.attention(q.float(), k.float(), v.float(), bias=bias + 256)
    check(out, want, eager.bfloat16(), what="out", case=case)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_every_backend_in_everything_at_once(dtype, any_backend):
    case = AttentionCase(batch=2, heads=4, kv_heads=2, seq_q=21, seq_k=35, dim=24, dim_v=16,
                         causal=True, mask=(2, 1, 21, 35), bias=(4, 1, 35), kv_lengths=(35, 20),
                         grads=BOTH, dtype=dtype)  # fmt: skip
    check_attention(case, any_backend)


DECODE = regimes(
    ("one query, long cache", {"batch": 1, "heads": 4, "seq_q": 1, "seq_k": 3000, "dim": 64}),
    ("GQA", {"batch": 3, "heads": 8, "kv_heads": 2, "seq_q": 1, "seq_k": 1111, "dim": 64}),
    ("MQA, odd head dim", {"heads": 5, "kv_heads": 1, "seq_q": 1, "seq_k": 513, "dim": 40}),
    (
        "GQA, causal, cache of unequal lengths",
        {"batch": 3, "heads": 4, "kv_heads": 2, "seq_q": 1, "seq_k": 900, "dim": 128,
         "causal": True, "kv_lengths": (900, 1, 450)},
    ),
    ("three queries", {"heads": 4, "kv_heads": 2, "seq_q": 3, "seq_k": 700, "causal": True}),
    ("bias and mask", {"seq_q": 1, "seq_k": 600, "bias": (1, 2, 1, 600), "mask": (2, 1, 1, 600)}),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DECODE)
def test_decode(case, dtype, backend):
    check_attention(dataclasses.replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequence(causal, fast_backend):
    check_attention(
        AttentionCase(batch=1, heads=1, seq_q=2500, dim=64, causal=causal), fast_backend
    )


def test_gradients_that_sum_over_many_queries(fast_backend):
    # In one fp32 chain over all queries dk and dv lose four times what blocked sums lose.
    case = AttentionCase(batch=1, heads=2, seq_q=16384, seq_k=8, dim=16)
    check_attention(case, fast_backend)


# One case or more for each path through the native kernels: tiles full and ragged, the triangle of
# causal, grouped heads, each broadcast of the bias's gradient, and the split over keys of decode.
PATHS = regimes(
    ("whole tiles", {"seq_q": 128, "dim": 64, "grads": BOTH}),
    ("ragged tiles", {"seq_q": 131, "seq_k": 197, "dim": 72, "dim_v": 40, "causal": True}),
    ("head dim 128", {"seq_q": 150, "dim": 128, "causal": True}),
    ("head dim 1", {"seq_q": 20, "dim": 1}),
    ("head dim 257", {"seq_q": 20, "dim": 257}),
    ("bias gradient", {"seq_q": 70, "bias": (2, 2, 70, 70), "causal": True}),
    ("bias gradient over batch", {"seq_q": 70, "bias": (1, 2, 70, 70)}),
    ("bias gradient over queries", {"seq_q": 70, "bias": (2, 1, 1, 70)}),
    ("bias gradient over keys", {"seq_q": 70, "bias": (1, 2, 70, 1), "grads": BOTH}),
    ("mask", {"seq_q": 70, "seq_k": 90, "mask": (2, 1, 70, 90), "heads": 4, "kv_heads": 2}),
    ("kv_lengths", {"batch": 3, "seq_q": 70, "kv_lengths": (70, 0, 33), "causal": True}),
    ("dropout", {"seq_q": 131, "seq_k": 197, "bias": (1, 2, 1, 197), "dropout_p": 0.3}),
    ("decode", {"heads": 8, "kv_heads": 2, "seq_q": 1, "seq_k": 1031, "dim": 64}),
    ("decode, dropout", {"seq_q": 1, "seq_k": 1031, "window": (1001, 0), "dropout_p": 0.3}),
    ("decode, kv_lengths", {"seq_q": 1, "seq_k": 800, "dim": 128, "kv_lengths": (800, 77)}),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PATHS)
def test_instruction_set(case, dtype, instruction_set):
    check_attention(dataclasses.replace(case, dtype=dtype), "cpu")


@given(case=drawn_cases())
def test_any_shape_and_options(case, fast_backend):
    # In a handful of elements eager may be exact by luck, and some of many examples find that.
    check_rules(case, fast_backend, slack=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_that_sees_nothing(dtype, backend):
    """out 0, LSE −inf and gradients 0, exactly; its key is as good as absent."""
    device = device_for(backend)
    shapes = ((2, 3, 6, 8), (2, 3, 10, 8), (2, 3, 10, 8))
    q, k, v = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)
    mask = torch.ones(6, 10, dtype=torch.bool, device=device)
    mask[4], mask[:, 7] = False, False
    out, lse = fusedattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    (out.sum() + lse[..., :4].sum()).backward()
    assert torch.equal(out[:, :, 4], torch.zeros_like(out[:, :, 4]))
    assert torch.equal(lse[:, :, 4], torch.full_like(lse[:, :, 4], float("-inf")))
    assert torch.equal(q.grad[:, :, 4], torch.zeros_like(q.grad[:, :, 4]))
    for grad in (k.grad, v.grad):
        assert torch.equal(grad[:, :, 7], torch.zeros_like(grad[:, :, 7]))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(2, 5), (5, 2)])
def test_causal_alignment_in_full(seq_q, seq_k, backend):
    """v is the identity, so out shows which keys were seen, against matrices written out."""
    seen = {
        (2, 5, "top_left"): ["x....", "xx..."],
        (2, 5, "bottom_right"): ["xxxx.", "xxxxx"],
        (5, 2, "top_left"): ["x.", "xx", "xx", "xx", "xx"],
        (5, 2, "bottom_right"): ["..", "..", "..", "x.", "xx"],
    }
    device = device_for(backend)
    q, k = torch.randn(1, 1, seq_q, 4, device=device), torch.randn(1, 1, seq_k, 4, device=device)
    v = torch.eye(seq_k, device=device)[None, None]
    for causal in (True, "bottom_right", "top_left"):
        out = fusedattn.attention(q, k, v, causal=causal, backend=backend)
        found = ["".join(".x"[int(p > 0)] for p in row) for row in out[0, 0].tolist()]
        assert found == seen[seq_q, seq_k, "bottom_right" if causal is True else causal]


def test_bitwise_repeatable(backend):
    case = AttentionCase(batch=3, heads=4, kv_heads=2, seq_q=150, bias=(1, 4, 1, 150), grads=BOTH)
    made = case.inputs(device_for(backend))
    first = fused(made, case, backend)
    for _ in range(5):
        again = fused(made, case, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)
