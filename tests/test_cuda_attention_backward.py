"""The gradients of attention in CUDA C++, on the emulator in random thread orders.

The kernels are called with the reference's out and log-sum-exp, rounded as the forward rounds them.
"""

from __future__ import annotations

import pytest
import torch
from cases.attention import AttentionCase, check_results, regimes, results
from fusedattn import _native
from fusedattn.ops.attention_config import AttentionBackwardCall, configure
from fusedattn.reference import functional as reference

F16, BF16 = torch.float16, torch.bfloat16
BOTH = ("out", "lse")
LITTLE = 99 * 1024  # shared memory of sm_86, sm_89 and sm_120

emulated = _native.cuda_emulated()
pytestmark = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")


def backward(made: dict, case: AttentionCase, deterministic: bool = False) -> dict:
    """out and lse as given to the kernels, and the gradients from them."""
    found = results(made, case, reference.attention, torch.float32)
    out, lse = found["out"].to(case.dtype), found["lse"]
    q, k, v = made["q"], made["k"], made["v"]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dout, dlse = (made[f"d{x}"] if x in case.grads else None for x in BOTH)
    config = configure(q.shape[3], **case.options(), deterministic=deterministic)
    lengths = made["kv_lengths"]
    call = AttentionBackwardCall(dout, dlse, out, lse, q, k, v, kv_lengths=lengths, config=config)
    emulated.attention_backward(call, dq, dk, dv, None, None, None)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


CASES = regimes(
    ("full", {"seq_q": 70, "seq_k": 150, "dim": 64}),
    ("f16", {"seq_q": 40, "seq_k": 150, "dim": 64, "dtype": F16}),
    ("f16_large", {"seq_q": 40, "seq_k": 150, "dim": 64, "dtype": F16, "scale": 1e-3,
                   "grads": BOTH, "large": True}),
    ("f16_large_causal_gqa", {"heads": 4, "kv_heads": 2, "seq_q": 40, "dim": 72, "dim_v": 40,
                              "dtype": F16, "scale": 1e-3, "causal": True, "large": True}),
    ("f16_large_dim_136_168", {"seq_q": 20, "dim": 136, "dim_v": 168, "heads": 1, "dtype": F16,
                               "scale": 1e-3, "large": True}),
    ("softcap", {"seq_q": 70, "dim": 64, "causal": True, "softcap": 1.5}),
    ("causal", {"seq_q": 150, "dim": 64, "causal": True, "heads": 1}),
    ("top_left_fewer_queries", {"seq_q": 30, "seq_k": 150, "dim": 64, "causal": "top_left"}),
    ("top_left_fewer_keys", {"seq_q": 150, "seq_k": 30, "dim": 64, "causal": "top_left"}),
    ("bottom_right_fewer_queries", {"seq_q": 30, "seq_k": 150, "dim": 64, "causal": True}),
    ("rows_that_see_nothing", {"seq_q": 150, "seq_k": 30, "dim": 64, "causal": True}),
    ("gqa", {"heads": 4, "kv_heads": 2, "seq_q": 40, "dim": 64, "causal": True}),
    ("mqa", {"heads": 3, "kv_heads": 1, "seq_q": 20, "dim": 64}),
    ("kv_lengths", {"batch": 3, "seq_q": 20, "seq_k": 140, "dim": 64, "kv_lengths": (140, 0, 17)}),
    ("kv_lengths_causal", {"batch": 2, "seq_q": 20, "seq_k": 50, "dim": 64, "causal": True,
                           "kv_lengths": (33, 50)}),
    ("lse_gradient_alone", {"seq_q": 40, "dim": 64, "causal": True, "grads": ("lse",)}),
    ("out_and_lse_gradients", {"seq_q": 40, "dim": 64, "grads": BOTH}),
    ("scale_0", {"seq_q": 40, "dim": 64, "scale": 0.0}),
    ("scale_negative", {"seq_q": 40, "dim": 64, "scale": -0.3, "causal": True}),
    ("one_query", {"seq_q": 1, "seq_k": 129, "dim": 64}),
    ("one_key", {"seq_q": 65, "seq_k": 1, "dim": 64, "grads": BOTH}),
    ("dim_8", {"seq_q": 33, "dim": 8}),
    ("dim_72_40", {"seq_q": 70, "seq_k": 40, "dim": 72, "dim_v": 40, "heads": 1}),
    ("dim_40_88", {"seq_q": 33, "dim": 40, "dim_v": 88, "heads": 1}),
    ("dim_128", {"seq_q": 70, "seq_k": 150, "dim": 128, "heads": 1, "causal": True}),
    ("dim_192_128", {"seq_q": 70, "dim": 192, "dim_v": 128, "heads": 1, "causal": True}),
    ("dim_136_168_f16", {"seq_q": 40, "dim": 136, "dim_v": 168, "heads": 1, "dtype": F16}),
    ("dim_256", {"seq_q": 70, "dim": 256, "heads": 1, "causal": True, "grads": BOTH}),
    dtype=BF16, batch=1,
)  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("shared", [LITTLE, 227 * 1024], ids=["little", "large"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: AttentionCase, shared: int, deterministic: bool) -> None:
    emulated.device(max_shared_bytes=shared)
    made = case.inputs()
    found = backward(made, case, deterministic)
    check_results(found, made, case, label=f"deterministic={deterministic} {case}")


@pytest.mark.parametrize("dim", [64, 128])
def test_dq_is_added_float_by_float_before_sm_90(dim: int) -> None:
    emulated.device(capability=80)
    case = AttentionCase(batch=1, seq_q=70, seq_k=150, dim=dim, dtype=BF16, causal=True)
    made = case.inputs()
    check_results(backward(made, case), made, case, label=str(case))
