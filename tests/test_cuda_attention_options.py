"""Attention in CUDA C++ with the options that its kernels of every option are for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import fusedattn
import pytest
import torch
from cases import on
from cases.attention import AttentionCase, check_attention, check_results, fused, regimes
from cases.varlen import VarlenCase, check_varlen
from compare import device_for
from fusedattn import _native
from fusedattn.ops.attention import op
from fusedattn.ops.attention_backends import _cuda_takes
from fusedattn.ops.attention_config import AttentionBackwardCall, AttentionCall
from fusedattn.reference import functional as reference
from test_cuda_attention_backward import BF16, BOTH, F16
from test_cuda_rowwise import set_device

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")
emulated = _native.cuda_emulated()
needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

GQA = {"heads": 4, "kv_heads": 2}
EVERY = {"window": (40, 9), "softcap": 1.5, "alibi_slopes": (2,), "sinks": True, "dropout_p": 0.3,
         "grads": BOTH}  # fmt: skip

# Tiles of the forward have 128 queries and 64 keys, those of the backward 64 of each.
CASES = regimes(
    ("window", {"seq_q": 140, "window": (63, 5), "heads": 1}),
    ("window_causal", GQA | {"seq_q": 35, "seq_k": 190, "window": (64, None), "causal": True}),
    ("window_top_left", {"seq_q": 130, "seq_k": 70, "window": (20, 0), "causal": "top_left"}),
    ("window_to_the_right", {"seq_q": 40, "seq_k": 135, "window": (None, 3)}),
    ("window_of_one_key", {"seq_q": 70, "window": (0, 0), "softcap": 2.0}),
    ("window_kv_lengths", {"batch": 3, "seq_q": 20, "seq_k": 140, "window": (80, None),
                           "kv_lengths": (140, 0, 17)}),
    ("window_scale_negative", {"seq_q": 40, "window": (9, 3), "scale": -0.3}),
    ("window_scale_0", {"seq_q": 40, "window": (9, 3), "scale": 0.0, "dtype": F16}),
    ("slopes", GQA | {"seq_q": 70, "seq_k": 50, "alibi_slopes": (1, 4)}),
    ("slopes_of_each_batch", {"batch": 2, "seq_q": 70, "alibi_slopes": (2, 2), "causal": True}),
    ("slopes_f16_large", {"seq_q": 40, "dtype": F16, "scale": 1e-3, "large": True,
                          "alibi_slopes": (2,)}),
    ("sinks", {"seq_q": 70, "seq_k": 30, "sinks": True, "causal": True, "grads": BOTH}),
    ("sinks_window", GQA | {"seq_q": 70, "sinks": True, "causal": True, "window": (30, None)}),
    ("dropout_causal", {"batch": 2, "seq_q": 70, "causal": True, "dropout_p": 0.3}),
    ("dropout_f16_large", {"seq_q": 40, "dtype": F16, "scale": 1e-3, "large": True,
                           "dropout_p": 0.8, "grads": BOTH}),
    ("all_dropped", {"seq_q": 40, "dropout_p": 1.0, "sinks": True, "grads": BOTH}),
    ("bias", {"batch": 2, "seq_q": 70, "seq_k": 90, "bias": (2, 2, 70, 90)}),
    ("bias_f32", {"seq_q": 70, "bias": (1, 2, 70, 70), "bias_dtype": torch.float32,
                  "softcap": 2.0, "scale": -0.6}),
    ("bias_f16_large", {"seq_q": 40, "dtype": F16, "scale": 1e-3, "large": True,
                        "bias": (1, 1, 40, 40), "bias_dtype": torch.float32}),
    ("every_option", EVERY | GQA | {"seq_q": 70, "seq_k": 90, "bias": (1, 1, 70, 90),
                                    "alibi_slopes": (4,)}),
    dtype=BF16, batch=1, dim=64,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_option(case: AttentionCase, backend: str) -> None:
    check_attention(case, backend)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize(("dim", "dtype"), [(64, F16), (72, BF16), (128, BF16), (192, F16),
                                            (256, BF16)])  # fmt: skip
def test_every_option_of_each_row(dim: int, dtype: torch.dtype, deterministic, backend) -> None:
    sizes = {"heads": 2, "kv_heads": 1, "seq_q": 35, "seq_k": 70, "dim": dim, "dim_v": dim - 8}
    case = AttentionCase(**EVERY, **sizes, batch=1, dtype=dtype, bias=(1, 1, 35, 70))
    made = on(device_for(backend), case.inputs())
    found = fused(made, case, backend, deterministic)
    check_results(found, made, case, label=f"{backend} {deterministic=} {case}")


def test_lowest_and_infinite_bias(backend: str) -> None:
    """A row whose keys all have the lowest bias sees them alike; one of −inf sees none."""
    case = AttentionCase(batch=1, heads=1, seq_q=40, dim=64, dtype=BF16, bias=(1, 1, 40, 40),
                         bias_dtype=torch.float32)  # fmt: skip
    made = case.inputs()
    made["bias"][..., 3, :] = torch.finfo(torch.float32).min
    made["bias"][..., 4, 5:] = torch.finfo(torch.float32).min
    made["bias"][..., 5, :] = -torch.inf
    made["dout"][..., 3, :] = 0  # the log-sum-exp of that row has no room for the number of keys
    found = check_attention(case, backend, made)
    assert not found["out"][..., 5, :].any()
    assert found["lse"][..., 5].isneginf().all()


@pytest.mark.parametrize(
    "changes",
    [{"window": (300, 2)}, {"sinks": True, "seq_q": 1, "causal": True}, {"dropout_p": 0.3},
     {"bias": (1, 1, 1, 520), "alibi_slopes": (4,), "sinks": True}],
    ids=lambda changes: "_".join(changes),
)  # fmt: skip
def test_keys_split_between_blocks(changes: dict, backend: str) -> None:
    set_device(backend, multiprocessors=9)
    sizes = GQA | {"seq_q": 3, "seq_k": 520, "dim": 24}
    check_attention(AttentionCase(**sizes | changes, batch=1, dtype=BF16), backend)


@pytest.mark.parametrize("p", [0.25, 0.7])
def test_dropout_is_that_of_the_reference(p: float, backend: str) -> None:
    """With weights that are all alike, what is left of them is the output."""
    device = device_for(backend)
    q, k = (torch.zeros(2, h, s, 64, dtype=BF16, device=device) for h, s in ((4, 40), (2, 64)))
    v = torch.eye(64, dtype=BF16, device=device).expand(2, 2, 64, 64).clone().requires_grad_()
    out = fusedattn.attention(q, k, v, dropout_p=p, seed=2**40 + 3, backend=backend)
    want = reference.attention_dropout(torch.ones(2, 4, 40, 64), p, 2**40 + 3)
    assert torch.equal(out.cpu() != 0, want != 0)
    torch.testing.assert_close(out.float().cpu() * 64, want, rtol=1e-2, atol=0)
    dout = torch.eye(40, 64, dtype=BF16, device=device).expand(out.shape).clone()
    dout[:, 1::2] = 0
    (dv,) = torch.autograd.grad(out, v, dout)  # of the even heads
    assert torch.equal(dv[..., :40].mT.cpu() != 0, want[:, ::2] != 0)


VARLEN = {
    "window, slopes of sequences, sinks, GQA": VarlenCase(
        (63, 0, 5, 65), (40, 7, 0, 130), (3, 2), kv_heads=1, window=(30, 6),
        alibi_slopes="sequences", sinks=True, dtype=BF16,
    ),
    "fp16, causal, softcap, slopes of heads": VarlenCase(
        (32, 1, 130), (64, 40, 140), (0, 65), causal=True, alibi_slopes="heads", softcap=3.0,
        dtype=F16,
    ),
    "top-left, Dv, rest of queries": VarlenCase(
        (35, 1, 1, 20), (20, 1, 2, 35), (130, 0), causal="top_left", dim_v=24, dtype=BF16
    ),
    "nothing but empty ones": VarlenCase((0, 0), (0, 3), (4, 1), dtype=BF16),
}  # fmt: skip


@pytest.mark.parametrize("case", VARLEN.values(), ids=VARLEN)
def test_packed(case: VarlenCase, backend: str) -> None:
    found = check_varlen(case, backend)
    end_q, end_k = sum(case.lengths_q), sum(case.lengths_k or ())
    for name, end in (("out", end_q), ("dq", end_q), ("dk", end_k), ("dv", end_k)):
        assert not found[name][end:].any(), name
    assert found["lse"][:, end_q:].isneginf().all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_packed_as_a_batch(deterministic: bool, backend: str) -> None:
    """Sequences of one length are a batch: bit for bit, dropout and dQ without atomics too."""
    case = AttentionCase(batch=3, seq_q=70, dim=64, dtype=BF16, causal=True)
    made = on(device_for(backend), case.inputs())
    options = {"causal": True, "dropout_p": 0.3, "seed": 5, "window": (40, None),
               "deterministic": deterministic, "backend": backend}  # fmt: skip
    x = [made[name].transpose(1, 2).flatten(0, 1).requires_grad_() for name in "qkv"]
    cu = torch.arange(0, 211, 70, dtype=torch.int32, device=x[0].device)
    packed = fusedattn.attention_varlen(*x, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
    batched = fusedattn.attention(*(y.unflatten(0, (3, 70)).transpose(1, 2) for y in x), **options)
    batched = batched.transpose(1, 2).flatten(0, 1)
    assert torch.equal(packed, batched)
    dout = made["dout"].transpose(1, 2).flatten(0, 1)
    of_packed, of_batch = (torch.autograd.grad(y, x, dout) for y in (packed, batched))
    for name, a, b in zip("qkv", of_packed, of_batch, strict=True):
        if name == "q" and not deterministic:
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(a, b), name


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """Rows that are in no sequence, or in two, are written by nobody, or by both: no more."""
    try:
        yield
    except RuntimeError as error:
        assert re.search("no kernel has written|a race in tensor", str(error))  # noqa: PT017


@needs_emulator
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "offsets", [(5, 2, 9), (-3, 4, 40), (2**30, -(2**30), 2**31 - 1), (0, 100, 3, 10)], ids=str
)
def test_wrong_offsets_stay_inside(offsets: tuple[int, ...], deterministic: bool) -> None:
    """The emulator ends a kernel that leaves its tensors."""
    q, k, v, dout = (torch.randn(1, 2, 10, 16, dtype=BF16) for _ in range(4))
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    lse = torch.full((1, 2, 10), -torch.inf)
    cu = torch.tensor(offsets, dtype=torch.int32)
    call = AttentionCall(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu.flip(0))
    config = call.config._replace(deterministic=deterministic)
    slopes = torch.zeros(len(offsets) - 1, 2, 1, 1)
    call = call._replace(alibi_slopes=slopes, config=config)
    kernels = op.kernels("cuda_emulated")
    with inside():
        kernels.forward(call, out, lse)
    backward = AttentionBackwardCall(dout, None, out, lse, *call[:-1], config=call.config)
    with inside():
        kernels.backward(backward, dq, dk, dv, None, torch.zeros_like(slopes), None)


def test_too_many_sequences_are_refused() -> None:
    x = torch.zeros(1, 2, 8, 16, dtype=BF16)
    cu = torch.zeros((), dtype=torch.int32).expand(2**22 + 2)
    refusal = _cuda_takes(AttentionCall(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu))
    assert refusal[:2] == (f"there are {2**22 + 1} sequences", f"pack at most {2**22}")


@needs_emulator
def test_sums_have_an_order() -> None:
    """Gradients of slopes and of a bias are the same bit for bit, whatever the threads do."""
    case = AttentionCase(batch=2, heads=2, kv_heads=1, seq_q=70, dim=64, dtype=BF16,
                         alibi_slopes=(2,), bias=(1, 1, 1, 70))  # fmt: skip
    made = case.inputs()

    def gradients(seed: int) -> dict[str, torch.Tensor]:
        emulated.seed(seed)
        return fused(made, case, "cuda_emulated", deterministic=True)

    want = gradients(0)
    for seed in (1, 2):
        found = gradients(seed)
        assert all(torch.equal(found[x], want[x]) for x in ("dalibi_slopes", "dbias", "dk", "dv"))
