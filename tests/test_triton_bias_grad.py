"""The gradient of a bias of pairs on Triton: of every shape, in the pass of the others or in order.

Under the interpreter tiles are 32 queries by 16 keys.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases.attention import AttentionCase, check_attention, check_results, fused
from compare import device_for
from fusedattn.ops.attention_config import AttentionBackwardCall, AttentionCall, AttentionConfig
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

from fusedattn.kernels.attention_bwd import attention_backward  # noqa: E402
from fusedattn.kernels.attention_fwd import attention_forward  # noqa: E402
from fusedattn.kernels.plans import Launches  # noqa: E402
from fusedattn.kernels.tuning import Tuner  # noqa: E402

# Without a gradient of lse that of a bias of one column is 0.
case_of = functools.partial(AttentionCase, batch=2, seq_q=37, seq_k=21, grads=("out", "lse"))
DEVICE = device_for("triton")
BF16 = torch.bfloat16


@pytest.mark.parametrize("rows", [False, True], ids=["one row", "each row"])
@pytest.mark.parametrize("cols", [False, True], ids=["one column", "each column"])
@pytest.mark.parametrize(
    ("batch", "heads"), [(1, 1), (1, 2), (2, 1), (2, 2)], ids=["all", "heads", "batches", "both"]
)
def test_every_shape(batch: int, heads: int, rows: bool, cols: bool) -> None:
    shape = (batch, heads, 37 if rows else 1, 21 if cols else 1)
    check_attention(case_of(kv_heads=1, bias=shape, causal=True), "triton")


IN_ORDER = {
    "pairs, causal, ds beyond fp16": case_of(
        bias=(1, 1, 37, 21), bias_dtype=torch.float32, causal=True, dtype=torch.float16,
        large=True, scale=1e-3,
    ),
    "one row, dropout, lengths": case_of(bias=(2, 1, 1, 21), dropout_p=0.3, kv_lengths=(21, 9)),
    "one element": case_of(heads=1, bias=(1, 1, 1, 1), dtype=BF16, window=(9, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_ORDER.values(), ids=IN_ORDER)
def test_in_order(case: AttentionCase) -> None:
    """With `deterministic`, where several programs would add."""
    made = case.inputs(DEVICE)
    check_results(fused(made, case, "triton", deterministic=True), made, case, label=str(case))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched; each was timed before."""
    names: list[str] = []
    launch = Launches.launch

    def tell(self: Launches, kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        launch(self, kernel, *args, **options)

    def time(self: Tuner, candidates: Any, launch: Any, **about: Any) -> Any:
        launch(candidates[0])
        return candidates[0]

    monkeypatch.setattr(Launches, "launch", tell)
    monkeypatch.setattr(Tuner, "pick", time)
    return names


SHAPES = {
    "pairs": ((2, 1, 20, 20), "dq_kernel", None),
    "pairs of all": ((1, 1, 20, 20), "dq_kernel", "bias_grad_kernel"),
    "one row of all": ((1, 1, 1, 20), "dkdv_kernel", "bias_grad_kernel"),
}


@pytest.mark.parametrize(("shape", "kernel", "ordered"), SHAPES.values(), ids=SHAPES)
def test_alone_it_takes_one_kernel(
    shape: tuple[int, ...], kernel: str, ordered: str | None, launched: list[str]
) -> None:
    """The one that has ds at hand, which writes nothing else and what it writes with all."""
    made = case_of(heads=1, seq_q=20, seq_k=20, dim=16, bias=shape).inputs(DEVICE)
    q, k, v, bias = (made[name] for name in ("q", "k", "v", "bias"))
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    nan = functools.partial(torch.full_like, fill_value=torch.nan)

    config = AttentionConfig(2, 0.2)
    call = AttentionCall(q, k, v, None, bias, None, config=config)
    attention_forward(call, out, lse)

    def gradient(alone: bool, deterministic: bool) -> Tensor:
        tensors = (made["dout"], None, out, lse, *call[:-1])
        backward = AttentionBackwardCall(
            *tensors, config=config._replace(deterministic=deterministic)
        )
        launched.clear()
        found = nan(bias)
        others = (None, None, None) if alone else (nan(q), nan(k), nan(v))
        attention_backward(backward, *others, found)
        assert all(x is None or x.isfinite().all() for x in others)
        return found

    attention_backward.plans.clear()
    want = gradient(alone=False, deterministic=False)
    assert launched == ["delta_kernel", "dkdv_kernel", "dq_kernel"]
    assert torch.equal(gradient(alone=True, deterministic=False), want)
    assert launched == ["delta_kernel", kernel]
    assert torch.equal(gradient(alone=True, deterministic=False), want)  # by a plan
    assert launched == []
    in_order = gradient(alone=True, deterministic=True)
    assert launched == ["delta_kernel", ordered or kernel]
    torch.testing.assert_close(in_order, want, rtol=1e-5, atol=1e-6)
    attention_backward.plans.clear()


def test_slopes_below_zero_raise_no_query_that_is_not_there() -> None:
    """In the last tile, where exp of their scores is infinite, and times 0 NaN."""
    case = case_of(batch=1, seq_k=37, alibi_slopes=(2,))
    made = case.inputs(DEVICE)
    made["alibi_slopes"] = torch.tensor([-3.0, 0.1], device=DEVICE)
    # lse, near 100, has as many digits less than softmax, which eager takes.
    check_attention(case, "triton", made, slack=4.0)
