"""Shapes, limits, numerics: bugs that other libraries have had, with their trackers' numbers."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, check_attention, fused, results
from compare import check, device_for
from fusedattn.reference import functional as reference
from processes import in_a_new_process

pytestmark = pytest.mark.backends("fast", "cuda_emulated")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOTH = ("out", "lse")


# --- shapes and limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("seq_q", range(1, 18))
def test_fewer_queries_than_a_tile(seq_q, backend):
    """kernels#6, flash-linear-attention#88"""
    check_attention(AttentionCase(heads=4, seq_q=seq_q, seq_k=20, dim=128, dtype=BF16), backend)


@pytest.mark.parametrize("seq", [1, 31, 33, 127, 129])
def test_ragged_tail_under_bias_and_mask_together(seq, backend):
    """pytorch#153799, pytorch#133717"""
    shape = (1, 2, seq, seq)
    case = AttentionCase(seq_q=seq, causal=True, bias=shape, mask=shape, grads=BOTH)
    check_attention(case, backend)


@pytest.mark.parametrize("seq_q", [1, 10])
def test_cache_longer_than_what_it_holds(seq_q, backend):
    """transformers#30437: with 10 of 64 slots in use, the same as the cropped call."""
    device = device_for(backend)
    q = torch.randn(2, 4, seq_q, 32, device=device)
    k, v = torch.randn(2, 2, 2, 64, 32, device=device)
    lengths = torch.full((2,), 10, dtype=torch.int32, device=device)
    found = fusedattn.attention(q, k, v, kv_lengths=lengths, backend=backend)
    want = fusedattn.attention(q, k[:, :, :10], v[:, :, :10], backend=backend)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dim", [72, 104])
def test_padded_head_dim(dim, backend):
    """flash-attention#2896: only dq was wrong."""
    check_attention(AttentionCase(batch=1, seq_q=140, dim=dim, dtype=BF16, causal=True), backend)


@pytest.mark.parametrize("seq_k", [7, 640, 2000])
def test_batch_stride_of_split_keys(seq_k, fast_backend):
    """vllm-project/flash-attention#176: each row of a batch as in a batch of one."""
    q = torch.randn(3, 1, 4, 64).transpose(1, 2)
    k, v = torch.randn(2, 3, seq_k, 2, 64).transpose(2, 3)
    found = fusedattn.attention(q, k, v, backend=fast_backend)
    for i in range(3):
        row = slice(i, i + 1)
        want = fusedattn.attention(q[row], k[row], v[row], backend=fast_backend)
        torch.testing.assert_close(found[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(65536, 1, 1, 8), (1, 65536, 1, 8), (300, 300, 1, 8)], ids=str)
def test_more_than_65535_of_batch_and_heads(shape, fast_backend):
    """pytorch#142228: the limit on the dimensions of a grid. One key takes all the weight."""
    q, k, v = torch.randn(3, *shape)
    out = fusedattn.attention(q, k, v, backend=fast_backend)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(8, 32769), (8, 65537), (65537, 8)])
def test_length_beyond_16_bits(seq_q, seq_k, fast_backend):
    """xformers#719, pytorch#162588: the last queries, which see all that the mask leaves."""
    shape = {"batch": 1, "heads": 1, "seq_k": seq_k, "dim": 16, "mask": (1, 1, 1, seq_k)}
    case = AttentionCase(seq_q=seq_q, **shape, causal="top_left" if seq_q > seq_k else True)
    made = case.inputs()
    found = fused(made, case, fast_backend)
    made |= {name: made[name][:, :, -8:] for name in ("q", "dout", "dlse")}
    last = AttentionCase(seq_q=8, **shape, causal=seq_q <= seq_k)
    want, eager = (results(made, last, reference.attention, dtype) for dtype in (F64, F32))
    for name in ("out", "lse", "dq"):
        check(found[name][:, :, -8:], want[name], eager[name], what=name, gradient=name == "dq")


# --- numerics ------------------------------------------------------------------------------------


def test_float32_is_not_tf32(backend):
    """triton#8654: inputs of the order of 100."""
    q, k, v = torch.randn(3, 1, 2, 128, 64, device=device_for(backend)) * 100
    out = fusedattn.attention(q, k, v, scale=1e-4, backend=backend)
    x = [y.double() for y in (q, k, v)]
    want, _ = reference.attention(*x, scale=1e-4)
    eager, _ = reference.attention(q, k, v, scale=1e-4)
    check(out, want, eager, what="out")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kind", ["heavy tails", "one-hot", "one large channel", "constant"])
def test_inputs_that_are_not_gaussian(kind, dtype, backend):
    """TransformerEngine#3216: a wrong dq that randn hides."""
    case = AttentionCase(
        heads=8, kv_heads=2, seq_q=67, dim=96, dtype=dtype, causal=True, grads=BOTH
    )
    made = case.inputs(device_for(backend))
    for name in "qkv":
        x = made[name].float()
        made[name] = {
            "heavy tails": lambda x: x / torch.rand_like(x).clamp_min(0.05),
            "one-hot": lambda x: 8 * torch.zeros_like(x).scatter_(-1, x.argmax(-1, True), 1),
            "one large channel": lambda x: torch.cat((x[..., :-1], 0 * x[..., -1:] + 20), -1),
            "constant": lambda x: torch.full_like(x, 0.5),
        }[kind](x).to(dtype)
    check_attention(case, backend, made)


def test_no_buffer_grows_with_the_square_of_the_length(fast_backend):
    """At 8192 keys one matrix of scores would be 256 MiB; the process may grow by 64 MiB."""
    if fast_backend == "reference":
        pytest.skip("the reference keeps the whole matrix")
    code = (
        "import resource, torch, fusedattn\n"
        "def run(seq):\n"
        "    q, k, v = (torch.randn(1, 1, seq, 64, requires_grad=True) for _ in 'qkv')\n"
        "    keep = torch.rand(1, 1, 1, seq) < 0.9\n"
        "    slope = torch.zeros(1, 1, 1, seq, requires_grad=True)\n"
        "    for options in ({}, {'mask': keep}, {'bias': slope}):\n"
        "        fusedattn.attention(q, k, v, causal=True, **options).sum().backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = run(512)\n"
        "inputs_outputs_gradients = 8192 * 64 * 4 * 8 // 1024\n"
        "print(run(8192) - before - inputs_outputs_gradients)"
    )
    assert int(in_a_new_process(code)) < 64 * 1024


def test_one_openmp_runtime():
    """pytorch#193520: the native module uses torch's OpenMP and brings none of its own."""
    code = (
        "import re, torch\n"
        "def runtimes():\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    return sorted(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp)\\S*', maps)))\n"
        "before = runtimes()\n"
        "import fusedattn\n"
        "fusedattn.attention(*torch.randn(3, 2, 2, 64, 32))\n"
        "assert runtimes() == before, (before, runtimes())"
    )
    in_a_new_process(code)
