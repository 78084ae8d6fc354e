"""Attention in CUDA C++, both passes by their public function: on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, check_attention, check_results, fused, regimes
from fusedattn import _native
from test_attention import DECODE, HEAD_DIMS, KINDS, LENGTHS
from test_cuda_attention_backward import BF16, BOTH, CASES, F16, LITTLE

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")
emulated = _native.cuda_emulated()
needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")


@pytest.mark.parametrize("case", CASES)
def test_kind(case: AttentionCase, backend: str) -> None:
    check_attention(case, backend)


@needs_emulator
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_head_dim_in_little_memory(dim: int, dtype: torch.dtype) -> None:
    emulated.device(max_shared_bytes=LITTLE)
    sizes = {"batch": 1, "heads": 1, "seq_q": 140, "seq_k": 70, "dim": dim}
    check_attention(AttentionCase(**sizes, dtype=dtype, causal=True), "cuda_emulated")


ORDERS = regimes(
    ("full", {"seq_q": 40, "seq_k": 150, "dim": 64}),
    ("causal", {"seq_q": 150, "dim": 64, "heads": 1, "causal": True}),
    ("bottom_right_gqa", {"heads": 2, "kv_heads": 1, "seq_q": 20, "seq_k": 90, "dim": 64,
                          "causal": True, "grads": BOTH}),
    ("top_left", {"seq_q": 70, "seq_k": 90, "dim": 64, "heads": 1, "causal": "top_left"}),
    ("rows_that_see_nothing", {"seq_q": 150, "seq_k": 20, "dim": 64, "heads": 1, "causal": True}),
    ("kv_lengths", {"batch": 2, "heads": 1, "seq_q": 20, "seq_k": 90, "dim": 64,
                    "kv_lengths": (0, 77)}),
    ("lse_gradient_alone", {"heads": 1, "seq_q": 40, "dim": 64, "grads": ("lse",)}),
    ("scale_0", {"heads": 1, "seq_q": 40, "dim": 64, "scale": 0.0, "dtype": F16}),
    ("scale_negative", {"heads": 1, "seq_q": 40, "dim": 64, "scale": -0.3, "causal": True}),
    ("dim_72_40", {"heads": 1, "seq_q": 70, "seq_k": 40, "dim": 72, "dim_v": 40}),
    ("dim_120_128", {"heads": 1, "seq_q": 40, "seq_k": 70, "dim": 120, "dim_v": 128}),
    ("dim_192_128", {"heads": 1, "seq_q": 30, "seq_k": 70, "dim": 192, "dim_v": 128}),
    ("dim_256", {"heads": 1, "seq_q": 30, "seq_k": 70, "dim": 256, "causal": True, "grads": BOTH}),
    dtype=BF16, batch=1,
)  # fmt: skip


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("case", ORDERS)
def test_random_orders(case: AttentionCase) -> None:
    """Of threads: nothing but dQ by atomic additions depends on it."""
    made = case.inputs()

    def passes(seed: int) -> list[dict]:
        """Both passes of the public function; the backward again, deterministic."""
        emulated.seed(seed)
        return [fused(made, case, "cuda_emulated", how) for how in (False, True)]

    want = passes(0)[1]
    check_results(want, made, case, label=str(case))
    for seed in range(1, 11):
        atomics, deterministic = passes(seed)
        for name, x in want.items():
            assert torch.equal(deterministic[name], x), f"{name}, seed {seed}"
            if name != "dq":
                assert torch.equal(atomics[name], x), f"{name}, seed {seed}"
        torch.testing.assert_close(atomics["dq"], want["dq"], rtol=0.02, atol=0.02)


@needs_emulator
def test_the_tests_of_attention_run_on_the_emulator() -> None:
    """Those that its kernels take, and that is most of those without a mask."""
    cases = [
        dataclasses.replace(row.values[0], dtype=BF16)
        for row in (*KINDS, *HEAD_DIMS, *LENGTHS, *DECODE)
    ]
    taken = 0
    for case in cases:
        made = case.inputs()
        q, k, v, *options = (made[x] for x in ("q", "k", "v", "mask", "bias", "kv_lengths"))
        options = dict(zip(("mask", "bias", "kv_lengths"), options, strict=True))
        report = fusedattn.explain(
            fusedattn.attention,
            q,
            k,
            v,
            causal=case.causal,
            scale=case.scale,
            backend="cuda_emulated",
            **options,
        )
        taken += "cuda_emulated: takes it" in report
    assert taken >= 35, f"{taken} of {len(cases)}"


def test_row_that_sees_nothing(backend: str) -> None:
    case = AttentionCase(batch=2, seq_q=150, seq_k=30, dim=64, dtype=BF16, causal=True, grads=BOTH,
                         kv_lengths=(30, 0))  # fmt: skip
    found = {x: y.cpu() for x, y in check_attention(case, backend).items()}
    assert torch.equal(found["out"][:, :, :120], torch.zeros(2, 2, 120, 64, dtype=BF16))
    assert (found["lse"][:, :, :120] == -torch.inf).all()
    assert (found["lse"][1] == -torch.inf).all()
    assert not found["dq"][:, :, :120].any()
    assert not any(found[name][1].any() for name in ("out", "dq", "dk", "dv"))


@needs_emulator
def test_deterministic_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit, or by torch's flag: dQ is then the same bit for bit in any order of threads."""
    case = AttentionCase(batch=1, heads=1, seq_q=70, seq_k=260, dim=64, dtype=BF16)
    made = case.inputs()

    def dq(seed: int, deterministic: bool | None) -> torch.Tensor:
        emulated.seed(seed)
        leaf = made["q"].clone().requires_grad_()
        out = fusedattn.attention(
            leaf, made["k"], made["v"], deterministic=deterministic, backend="cuda_emulated"
        )
        return torch.autograd.grad(out, leaf, made["dout"])[0]

    assert all(torch.equal(dq(seed, True), dq(0, True)) for seed in range(5))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.equal(dq(7, None), dq(0, True))
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before)


REFUSED = [
    ({"dtype": torch.float32}, "dtype is torch.float32; use bfloat16 or float16"),
    ({"dim": 60}, "D is 60; use a multiple of 8, at most 256"),
    ({"dim": 64, "dim_v": 264}, "Dv is 264; use a multiple of 8, at most 256"),
    ({"mask": (1, 1, 32, 32)}, "mask is not supported; leave mask out"),
]


@needs_emulator
@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[x[1].split(";")[0] for x in REFUSED])
def test_what_is_refused(changes: dict, reason: str) -> None:
    case = dataclasses.replace(AttentionCase(dtype=BF16, dim=64), **changes)
    made = case.inputs()
    options = {"mask": made["mask"], "bias": made["bias"], "backend": "cuda_emulated"}
    options |= case.options()
    with pytest.raises(fusedattn.UnsupportedError, match=r"(?s)cuda_emulated: " + reason):
        fusedattn.attention(made["q"], made["k"], made["v"], **options)
    assert reason in fusedattn.explain(
        fusedattn.attention, made["q"], made["k"], made["v"], **options
    )


@needs_emulator
def test_rows_that_are_not_aligned_are_refused() -> None:
    q = torch.randn(1, 2, 32, 65, dtype=BF16)[..., :64]
    with pytest.raises(fusedattn.UnsupportedError, match=r"does not lie in rows of aligned 16"):
        fusedattn.attention(q, q, q, backend="cuda_emulated")
    k = torch.randn(2 * 32 * 64 + 1, dtype=BF16)[1:].view(1, 2, 32, 64)
    with pytest.raises(fusedattn.UnsupportedError, match=r"k of strides .*pass k.contiguous"):
        fusedattn.attention(k.clone(), k, k, backend="cuda_emulated")
