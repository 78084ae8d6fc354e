"""Masks, NaN and Inf: bugs that other libraries have had, with their trackers' numbers."""

from __future__ import annotations

import math

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, check_attention, fused, results
from compare import check, device_for
from fusedattn.reference import functional as reference

pytestmark = [
    pytest.mark.backends("fast", "cuda_emulated"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
# Where kernels for GPUs differ in kind from those of the CPU; small, for Triton is interpreted.
everywhere = pytest.mark.backends("fast", "triton", "cuda_emulated")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOTH = ("out", "lse")


@everywhere
@pytest.mark.parametrize("padded", [False, True], ids=["mask alone", "causal and padding"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_fully_masked_row(dtype, padded, backend):
    """pytorch#103749, pytorch#103963: out and dq are 0; dk and dv as if the row were not there."""
    case = AttentionCase(heads=3, seq_q=6, seq_k=10, dim=8, dtype=dtype, grads=BOTH)
    made = case.inputs(device_for(backend))
    mask = torch.ones(6, 10, dtype=torch.bool, device=made["q"].device)
    mask[5] = False
    if padded:
        # Left padding: the first queries see only keys that are padded away.
        mask &= torch.ones_like(mask).tril(4)
        mask[:, :6] = False
    gone = (~mask).all(1)
    made["mask"] = mask
    found = check_attention(case, backend, made)
    assert gone.any()
    assert torch.equal(found["out"][:, :, gone], torch.zeros_like(found["out"][:, :, gone]))
    assert (found["lse"][:, :, gone] == -math.inf).all()
    assert torch.equal(found["dq"][:, :, gone], torch.zeros_like(found["dq"][:, :, gone]))
    kept = {name: made[name][:, :, ~gone] for name in ("q", "dout", "dlse")}
    rest = fused({**made, **kept, "mask": mask[~gone]}, case, backend)
    for name in ("dk", "dv"):
        torch.testing.assert_close(found[name], rest[name])


@everywhere
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradient_of_the_log_sum_exp_of_a_row_that_sees_nothing(bad, backend):
    """flash-attention#889: lse.square().sum() sends −inf to a row of −inf; its gradients are 0."""
    case = AttentionCase(seq_q=20, seq_k=15, causal=True, bias=(2, 20, 15), grads=BOTH)
    made = case.inputs(device_for(backend))
    want = fused(made, case, backend)
    made["dlse"] = made["dlse"].clone()
    made["dlse"][:, :, :5] = bad
    found = fused(made, case, backend)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_keys_at_the_lowest_finite_number(dtype, backend):
    """pytorch#109517: leading keys at finfo.min."""
    case = AttentionCase(seq_q=141, dim=64, bias=(2, 2, 141, 141), dtype=dtype)
    made = case.inputs(device_for(backend))
    made["bias"][..., :48] = torch.finfo(dtype).min
    found = check_attention(case, backend, made)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("dtype", [F16, F32])
def test_whole_row_at_the_lowest_finite_number(dtype, backend):
    """pytorch#110213: a finite mask is additive; it does not mean masked."""
    case = AttentionCase(seq_q=20, dim=64, bias=(2, 2, 20, 20), dtype=dtype)
    made = case.inputs(device_for(backend))
    made["bias"][:, :, 3] = torch.finfo(dtype).min
    q, k, v, bias = (made[name] for name in ("q", "k", "v", "bias"))
    out = fusedattn.attention(q, k, v, bias=bias, backend=backend)
    want, _ = reference.attention(*(x.double() for x in (q, k, v)), bias=bias.double())
    # In float32 the scores vanish in finfo.min, whose ulp is 2e31; in half they are kept.
    row = v.mean(2) if dtype == F32 else want[:, :, 3].to(dtype)
    torch.testing.assert_close(out[:, :, 3], row, rtol=5e-3, atol=5e-3)
    others = [i for i in range(20) if i != 3]
    torch.testing.assert_close(out[:, :, others].double(), want[:, :, others], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("masked", ["bool", "lengths", "causal"])
def test_finite_sentinel_does_not_beat_valid_logits(masked, backend):
    """flashinfer#4401: valid logits near −1e5 lie below a −1e4 or −5e4 that stands for −inf."""
    case = AttentionCase(batch=1, heads=1, seq_q=8, seq_k=80, dim=16, scale=1.0, grads=BOTH)
    options = {"bool": {"mask": (1, 1, 1, 80)}, "lengths": {"kv_lengths": (41,)}}
    case = AttentionCase(**{**vars(case), **options.get(masked, {"causal": "top_left"})})
    made = case.inputs(device_for(backend))
    made["q"][..., -1], made["k"][..., -1] = 1e5, -1
    found = fused(made, case, backend)
    assert (found["lse"] < -9e4).all()
    # A float32 score near −1e5 is good to 1/128, and so is the logarithm of a probability.
    want = results(made, case, reference.attention, F64)["out"]
    torch.testing.assert_close(found["out"].double().cpu(), want.cpu(), rtol=0.03, atol=0.03)
    keys = torch.arange(80)
    visible = {"bool": made["mask"], "lengths": keys < 41, "causal": keys < 8}
    absent = ~visible[masked].reshape(80).to(found["dv"].device)
    assert torch.equal(found["dv"][:, :, absent], torch.zeros_like(found["dv"][:, :, absent]))


def test_scale_does_not_multiply_the_bias(backend):
    """tt-metal#42891"""
    case = AttentionCase(seq_q=21, bias=(1, 2, 21, 21), scale=0.05)
    check_attention(case, backend)


@everywhere
@pytest.mark.parametrize("seq", [31, 64, 65, 127])
def test_padded_tail_does_not_overflow_in_backward(seq, backend):
    """pytorch#196678: exp(0 − lse) of a padded key overflows when lse < −88.7."""
    case = AttentionCase(batch=1, heads=1, seq_q=seq, dim=64, dtype=BF16, causal=True)
    made = case.inputs(device_for(backend))
    made["q"][..., 0], made["k"][..., 0] = 1, -120 * 8
    found = fused(made, case, backend)
    assert (found["lse"] < -88.7).all()
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("seq_q", [1, 24])
@pytest.mark.parametrize(("dtype", "biased"), [(BF16, False), (F32, True)])
@everywhere
def test_nothing_leaks_from_past_the_lengths(dtype, biased, seq_q, backend):
    """flash-attention#1745: NaN in unused cache slots; bitwise as with zeros there."""
    lengths, seq_k = (32, 64, 96, 48, 0), 128
    if backend == "triton":
        lengths, seq_k = (17, 0), 33
    bias = (2, seq_q, seq_k) if biased else None
    case = AttentionCase(batch=len(lengths), kv_heads=1, seq_q=seq_q, seq_k=seq_k, dim=40,
                         dtype=dtype, kv_lengths=lengths, bias=bias, grads=BOTH)  # fmt: skip
    made = case.inputs(device_for(backend))
    for name in ("k", "v"):
        for cache, length in zip(made[name], lengths, strict=True):
            cache[:, length:] = 0
    want = fused(made, case, backend)
    for filler in (math.nan, math.inf):
        for name in ("k", "v"):
            for cache, length in zip(made[name], lengths, strict=True):
                cache[:, length:] = filler
        found = fused(made, case, backend)
        for name in want:
            assert torch.equal(found[name], want[name]), name


@everywhere
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_nan_query_reaches_its_own_row_only(dtype, backend):
    """pytorch#101967 asks for a contract; ours is that queries do not meet."""
    q, k, v = torch.randn(3, 2, 2, 70, 16, device=device_for(backend)).to(dtype)
    clean = fusedattn.attention(q, k, v, causal=True, backend=backend)
    q = q.clone()
    q[1, 0, 33] = math.nan
    out, lse = fusedattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    hit = torch.zeros(2, 2, 70, dtype=torch.bool, device=q.device)
    hit[1, 0, 33] = True
    assert out[hit].isnan().all()
    assert lse[hit].isnan().all()
    assert torch.equal(out[~hit], clean[~hit])


def test_infinite_scores_follow_torch(backend):
    """pytorch#25110: +inf gives NaN in its row; −inf hides a key, or, everywhere, the row."""
    case = AttentionCase(seq_q=6, seq_k=40, bias=(2, 2, 6, 40), grads=BOTH)
    made = case.inputs(device_for(backend))
    made["bias"][:, :, 1, 7] = math.inf
    made["bias"][:, :, 2, 1:] = -math.inf
    out, lse = fusedattn.attention(
        *(made[n] for n in "qkv"), bias=made["bias"], return_lse=True, backend=backend
    )
    assert out[:, :, 1].isnan().all()
    assert torch.equal(out[:, :, 2], made["v"][:, :, 0])
    assert out[:, :, (0, 2, 3, 4, 5)].isfinite().all()
    assert lse[:, :, (0, 2, 3, 4, 5)].isfinite().all()
    made["bias"][:, :, 1] = -math.inf
    found = check_attention(case, backend, made)
    assert torch.equal(found["out"][:, :, 1], torch.zeros_like(found["out"][:, :, 1]))
    assert (found["lse"][:, :, 1] == -math.inf).all()
    assert torch.equal(found["dq"][:, :, 1], torch.zeros_like(found["dq"][:, :, 1]))


@pytest.mark.parametrize("seq_q", [6, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.backends("cpu", "reference")
def test_a_sink_follows_torch(bad, seq_q, backend):
    """As a score does, in the rows of its head that see a key; the others don't see it either."""
    case = AttentionCase(seq_q=seq_q, seq_k=40, dtype=F32, sinks=True, kv_lengths=(40, 0))
    made = case.inputs()
    clean = fused(made, case, backend)
    made["sinks"][1] = bad
    found = fused(made, case, backend)
    for name in ("out", "lse", "dq"):
        assert found[name][0, 1].isnan().all(), name
        assert torch.equal(found[name][0, 0], clean[name][0, 0]), name
        assert torch.equal(found[name][1], clean[name][1]), name


@pytest.mark.parametrize("masked", [False, True])
def test_the_future_has_no_influence(masked, backend):
    """transformers#48748: causal with a mask; later tokens change no bit of earlier outputs."""
    q, k, v = torch.randn(3, 1, 2, 90, 16, device=device_for(backend))
    mask = torch.rand(1, 2, 90, 90, device=q.device) < 0.7 if masked else None
    options = {"mask": mask, "causal": True, "backend": backend}
    before = fusedattn.attention(q, k, v, **options)
    k, v = k.clone(), v.clone()
    k[:, :, 50:], v[:, :, 50:] = 7.0, -3.0
    after = fusedattn.attention(q, k, v, **options)
    assert torch.equal(before[:, :, :50], after[:, :, :50])
    assert not torch.equal(before[:, :, 50:], after[:, :, 50:])


@pytest.mark.parametrize("ties", [False, True], ids=["one key takes all", "ties"])
@pytest.mark.parametrize("seq_q", [1, 40])
@pytest.mark.parametrize("scale", [30.0, 1e4, 1e8, 1e20])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_far_scores(dtype, scale, seq_q, ties, instruction_set):
    """Scores so large that a product's rounding exceeds every exponent.

    Products of integers are exact in any order, so forward and backward see the same scores. A
    log-sum-exp of 1e8 does not hold the logarithm of how many keys tie, as in every flash backward.
    """
    case = AttentionCase(seq_q=seq_q, seq_k=700, dtype=dtype, scale=scale)
    made = case.inputs()
    made |= {name: 32 * (2 * made[name]).round() for name in ("q", "k")}
    if not ties:
        key = torch.arange(700)
        made["q"][..., 0], made["k"][..., 0] = 32, (key // 32).to(dtype)
        made["q"][..., 1], made["k"][..., 1] = 1, (key % 32).to(dtype)
    found = fused(made, case, "cpu")
    ref = results(made, case, reference.attention, F64)
    eager = results(made, case, reference.attention, F32)
    for name in ("out", "lse") if ties else ("out", "lse", "dv"):
        check(found[name], ref[name], eager[name], what=name, case=f"{instruction_set} {case}")
    if dtype != F16:  # whose gradients of q and k may overflow
        assert found["dq"].isfinite().all()
        assert found["dk"].isfinite().all()


@pytest.mark.parametrize("dtype", [F16, F32])
def test_infinite_key(dtype, instruction_set):
    """A score of −inf hides its key. Numbers split into parts cannot say so: ∞ · 0 would be NaN."""
    shape = (1, 1, 272, 32)
    q, k, v = torch.rand(shape) + 0.1, torch.rand(shape), torch.randn(shape)
    k[0, 0, 5, 3] = -math.inf
    dout = torch.randn(shape)
    x = [y.to(dtype) for y in (q, k, v, dout)]

    def outputs(x, **options):
        leaves = [y.requires_grad_() for y in x[:3]]
        out = fusedattn.attention(*leaves, **options)
        return out.detach(), *torch.autograd.grad(out, leaves[1:], x[3])

    found = outputs([y.clone() for y in x], backend="cpu")
    want = outputs([y.double() for y in x], backend="reference")
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-3 if dtype == F16 else 1e-5)
