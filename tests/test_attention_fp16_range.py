"""Gradients in fp16 where ds, which the kernels round to it, exceeds what fp16 holds.

The kernels of Triton and CUDA C++ scale it by a power of two for each head of keys. `reference`
does not: it is plain PyTorch in this dtype.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from cases.attention import AttentionCase, check_attention, fused, oracle
from compare import device_for

pytestmark = [
    pytest.mark.backends("cpu", "triton", "cuda_emulated", "cuda"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
case_of = functools.partial(AttentionCase, batch=1, dim=24, dtype=torch.float16, scale=1e-3)
BOTH = ("out", "lse")
LARGE = {
    "full": case_of(seq_q=33, seq_k=20, grads=BOTH),
    "causal, grouped heads, Dv > D": case_of(
        heads=4, kv_heads=2, seq_q=20, dim_v=40, causal=True, grads=BOTH
    ),
    "rows that see nothing, Dv < D": case_of(seq_q=40, seq_k=20, dim_v=16, causal=True),
    "gradient of lse alone": case_of(seq_q=20, grads=("lse",)),
    "dropout of most": case_of(seq_q=32, seq_k=2, dropout_p=0.98, scale=1e-4),
    "bias": case_of(seq_q=20, bias=(2, 20, 20), bias_dtype=torch.float32, causal=True),
    "shared bias": case_of(
        batch=2, heads=4, kv_heads=2, seq_q=20, bias=(4, 1, 20), bias_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large(case: AttentionCase, backend: str) -> None:
    if (case.bias or case.dropout_p) and backend.startswith("cuda"):
        pytest.skip("its kernels take no bias and no dropout")
    check_attention(dataclasses.replace(case, large=True), backend)


def test_every_finite_input(backend: str) -> None:
    """Two heads as large as fp16 and fp32 are; the gradients are finite by their scale."""
    case = case_of(seq_q=20, scale=1e-30, grads=BOTH)
    made = case.inputs(device_for(backend))
    for name, largest in {"v": 65504.0, "dout": 65504.0, "dlse": 1e32}.items():
        made[name] = largest * made[name].sign()
    made["dlse"][:, 1] = 0.0
    found = fused(made, case, backend)
    for name in ("dq", "dk"):
        want = oracle(made, case)[name]
        assert want[:, 0].abs().max() > 1
        torch.testing.assert_close(found[name].cpu().double(), want.cpu(), rtol=4e-3, atol=4e-2)
    assert found["dv"].isfinite().all()


def test_what_does_not_count(backend: str) -> None:
    """Not a bit depends on another head of keys, on rows that see nothing or on absent keys."""
    case = case_of(heads=4, kv_heads=2, seq_q=20, seq_k=12, kv_lengths=(9,), causal=True,
                         grads=BOTH)  # fmt: skip
    made = case.inputs(device_for(backend))
    made["v"] *= 1e-3  # ds is so small that scaling would be seen
    for name in ("k", "v"):
        made[name][:, :, 9:] = 0.0
    want = fused(made, case, backend)
    for filler in (6e4, torch.inf, torch.nan):
        other = {name: None if x is None else x.clone() for name, x in made.items()}
        other["v"][:, 0, 9:] = filler
        other["dout"][:, :2, :8], other["dlse"][:, :2, :8] = 6e4, 1e12
        for name in ("v", "dout", "dlse"):
            other[name][:, -1] = 6e4
        found = fused(other, case, backend)
        for name, x in want.items():
            own = x.shape[1] // 2
            assert torch.equal(found[name][:, :own], x[:, :own]), f"{name}, {filler}"


@pytest.mark.parametrize("name", ["bias", "shared bias"])
def test_without_need_nothing_is_scaled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_bwd = pytest.importorskip("fusedattn.kernels.attention_bwd", exc_type=ImportError)
    made = LARGE[name].inputs(device_for("triton"))
    found = fused(made, LARGE[name], "triton")
    monkeypatch.setattr(attention_bwd, "largest_norms", lambda *args: None)
    want = fused(made, LARGE[name], "triton")
    assert all(torch.equal(found[x], want[x]) for x in want)
