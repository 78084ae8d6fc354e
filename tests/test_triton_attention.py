"""Attention's Triton kernels, interpreted where there is no GPU, and on it where there is one.

Under the interpreter tiles are 32 queries by 16 keys, so lengths of 33 to 70 already have whole
tiles, tails and more than one tile on the diagonal.
"""

from __future__ import annotations

import functools

import compare
import pytest
import torch
from cases.attention import AttentionCase, check_attention
from fusedattn.ops.attention_config import (
    AttentionBackwardCall,
    AttentionCall,
    AttentionConfig,
)
from fusedattn.reference import functional as reference
from torch import Tensor

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

from fusedattn.kernels import attention_fwd, attention_launch  # noqa: E402
from fusedattn.kernels.attention_bwd import attention_backward  # noqa: E402
from fusedattn.kernels.attention_fwd import attention_forward  # noqa: E402
from fusedattn.kernels.common import aligned  # noqa: E402
from fusedattn.kernels.tuning import Tuner  # noqa: E402

case_of = functools.partial(AttentionCase, batch=1)
DEVICE = compare.device_for("triton")
BF16, FP16 = torch.bfloat16, torch.float16

REGIMES = {
    "full, tails in both directions": case_of(seq_q=37, seq_k=51),
    "whole tiles only": case_of(seq_q=64, seq_k=32),
    "causal": case_of(seq_q=70, causal=True),
    "causal, bottom-right, Sq < Sk": case_of(seq_q=35, seq_k=70, causal=True),
    "causal, bottom-right, Sq > Sk: rows that see nothing": case_of(
        seq_q=70, seq_k=35, causal=True
    ),
    "causal, top-left, Sq < Sk": case_of(seq_q=35, seq_k=70, causal="top_left"),
    "causal, top-left, Sq > Sk": case_of(seq_q=70, seq_k=35, causal="top_left"),
    "softcap, causal": case_of(seq_q=70, causal=True, softcap=1.5, dtype=BF16, dim=64),
    "softcap, bias and grouped heads": case_of(
        heads=4, kv_heads=2, seq_q=37, softcap=2.0, bias=(1, 4, 37, 37), scale=-0.6
    ),
    "window": case_of(seq_q=100, window=(40, 5), heads=4, kv_heads=2),
    "window, causal, Sq < Sk": case_of(seq_q=35, seq_k=130, window=(9, None), causal=True),
    "window, top-left, Sq > Sk": case_of(seq_q=130, seq_k=35, window=(20, 0), causal="top_left"),
    "window to the right": case_of(seq_q=40, seq_k=70, window=(None, 3)),
    "window of one key, softcap": case_of(seq_q=70, window=(0, 0), softcap=2.0, dtype=BF16),
    "window, bias": case_of(seq_q=70, window=(20, 2), bias=(1, 2, 70, 70)),
    "alibi": case_of(seq_q=70, seq_k=50, heads=4, kv_heads=2, alibi_slopes=(1, 4)),
    "alibi, causal, bf16": case_of(seq_q=70, alibi_slopes=(2,), causal=True, dtype=BF16, dim=64),
    "sinks": case_of(seq_q=70, heads=4, kv_heads=2, sinks=True, causal=True, window=(30, None)),
    "sinks, bias": case_of(seq_q=37, sinks=True, bias=(1, 2, 37, 37)),
    "dropout, causal": case_of(seq_q=37, causal=True, dropout_p=0.3, dtype=BF16, dim=64),
    "dropout, grouped heads, window, sinks, softcap": case_of(
        heads=2,
        kv_heads=1,
        seq_q=33,
        seq_k=40,
        window=(20, 3),
        sinks=True,
        softcap=2.0,
        dropout_p=0.6,
        grads=("out", "lse"),
    ),
    "dropout, shared bias, slopes": case_of(
        heads=1, batch=2, seq_q=20, seq_k=33, bias=(1, 1, 20, 33), alibi_slopes=(1,), dropout_p=0.4
    ),
    "one query": case_of(seq_q=1, seq_k=40, causal=True),
    "two keys": case_of(seq_q=40, seq_k=2),
    "grouped heads": case_of(heads=4, kv_heads=2, seq_q=33, causal=True),
    "one key head": case_of(heads=4, kv_heads=1, seq_q=20),
    "Dv < D": case_of(dim=64, dim_v=24, seq_q=33),
    "Dv > D": case_of(dim=24, dim_v=80, seq_q=33),
    "D 1": case_of(dim=1, seq_q=33),
    "D 72": case_of(dim=72, seq_q=20),
    "D 130": case_of(dim=130, seq_q=20),
    "D 512": case_of(heads=1, dim=512, seq_q=20),
    "bf16, causal": case_of(dtype=BF16, seq_q=70, dim=64, causal=True),
    "fp16, grouped heads": case_of(dtype=FP16, heads=4, kv_heads=2, seq_q=40, dim=64),
    "bf16, odd D": case_of(dtype=BF16, dim=24, seq_q=33, causal=True),
    "mask": case_of(batch=2, seq_q=37, mask=(2, 2, 37, 37)),
    "mask of keys": case_of(batch=2, seq_q=37, seq_k=50, mask=(2, 1, 1, 50)),
    "mask of queries": case_of(seq_q=37, seq_k=50, mask=(37, 1)),
    "mask and causal": case_of(seq_q=37, mask=(37, 37), causal=True),
    "bf16, mask, bias and causal": case_of(
        dtype=BF16, seq_q=37, mask=(37, 37), bias=(1, 2, 37, 37), causal=True
    ),
    "kv_lengths": case_of(batch=3, seq_q=37, kv_lengths=(0, 17, 37)),
    "kv_lengths out of range": case_of(batch=2, seq_q=20, kv_lengths=(-3, 99)),
    "kv_lengths, causal and bias": case_of(
        batch=2, seq_q=37, kv_lengths=(16, 30), causal=True, bias=(1, 2, 37, 37)
    ),
    "scale 0": case_of(seq_q=37, scale=0.0, causal=True),
    "scale < 0": case_of(seq_q=37, scale=-0.7, causal=True),
    "scale too small for fp32": case_of(seq_q=20, scale=1e-50, causal=True),
    "gradient of lse alone": case_of(seq_q=37, grads=("lse",)),
    "gradients of out and lse": case_of(seq_q=37, grads=("out", "lse"), causal=True),
}


@pytest.mark.parametrize("case", REGIMES.values(), ids=REGIMES)
def test_regimes(case: AttentionCase) -> None:
    check_attention(case, "triton")


def test_a_bias_in_fp32_on_inputs_in_bf16() -> None:
    case = case_of(dtype=BF16, seq_q=37, bias=(1, 1, 37, 37), bias_dtype=torch.float32)
    assert check_attention(case, "triton")["dbias"].dtype == torch.float32


def launch(
    made: dict[str, Tensor | None], causal: int = 0, scale: float = 0.2, **outputs: Tensor
) -> dict[str, Tensor]:
    """Both launchers, called directly; NaN in every output that is not given."""
    q, k, v, bias = (made[name] for name in ("q", "k", "v", "bias"))
    config = AttentionConfig(causal, scale)
    call = AttentionCall(q, k, v, made["mask"], bias, made["kv_lengths"], config=config)
    found = {
        "out": q.new_full((*q.shape[:3], v.shape[3]), torch.nan),
        "lse": q.new_full(q.shape[:3], torch.nan, dtype=torch.float32),
        "dq": torch.full_like(q, torch.nan),
        "dk": torch.full_like(k, torch.nan),
        "dv": torch.full_like(v, torch.nan),
        "dbias": None if bias is None else torch.zeros_like(bias, dtype=torch.float32),
    } | outputs
    results = found["out"], found["lse"]
    attention_forward(call, *results)
    grads = (found[name] for name in ("dq", "dk", "dv", "dbias"))
    attention_backward(
        AttentionBackwardCall(made["dout"], made["dlse"], *results, *call[:-1], config=config),
        *grads,
    )
    return {name: x for name, x in found.items() if x is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def relayouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory orders."""
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan)
    wide[..., 1::2] = x
    return {
        "heads inside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "head dim outside": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second, offset by one": wide[..., 1::2],
        "batch inside": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@functools.cache
def laid_out() -> tuple[dict, dict]:
    """A call on contiguous tensors, and its results."""
    case = case_of(batch=2, seq_q=33, bias=(2, 1, 33, 33), mask=(1, 1, 33, 33))
    made = case.inputs(DEVICE)
    return made, launch(made, causal=2)


@pytest.mark.parametrize("layout", relayouts(torch.zeros(1, 1, 1, 1)))
def test_layouts_are_read_and_written_in_place(layout: str) -> None:
    made, want = laid_out()
    moved = {
        name: x if x is None or x.dim() != 4 or x.dtype == torch.bool else relayouts(x)[layout]
        for name, x in made.items()
    }
    moved["mask"] = made["mask"].mT.contiguous().mT
    moved["dlse"] = made["dlse"].transpose(1, 2).contiguous().transpose(1, 2)
    outputs = {
        name: relayouts(torch.full_like(want[name], torch.nan))[layout]
        for name in ("out", "dq", "dk", "dv")
    }
    assert_equal(launch(moved, causal=2, **outputs), want)


def test_which_rows_are_aligned() -> None:
    """A GPU loads 16 bytes at once from rows of which it is told so; the interpreter does not."""
    rows = torch.empty(2, 5, 3, 72, dtype=BF16).transpose(1, 2)
    assert aligned(rows, rows[..., 8:40], rows.new_zeros(()).expand(rows.shape))
    assert aligned(rows[:1, :1, :1].mT.contiguous().mT), "a stride along which there is one element"
    assert not aligned(rows, relayouts(rows)["every second, offset by one"])
    assert not aligned(rows[..., :36].contiguous())
    assert aligned(rows[..., :36].float().contiguous())


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "out", "dq", "dk", "dv"])
def test_one_odd_layout_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = case_of(seq_q=3, dim=24, dtype=BF16).inputs(DEVICE), []

    def tell(*given: Tensor) -> bool:
        told.append(aligned(*given))
        return told[-1]

    monkeypatch.setattr(attention_launch, "aligned", tell)
    for launcher in (attention_forward, attention_backward):
        launcher.plans.clear()
    launch(made)
    attention_forward.plans.clear()
    odd = {name: torch.empty(1, 2, 3, 25, dtype=BF16, device=DEVICE)[..., 1:]}
    launch(made | odd, **{} if name in made else odd)
    assert told == [True, True, name in ("dout", "dq", "dk", "dv"), False]


def test_expanded_and_absent_gradients() -> None:
    made = case_of(seq_q=37).inputs(DEVICE)
    ones = torch.ones((), device=DEVICE)
    want = launch(made | {"dout": torch.ones_like(made["dout"]), "dlse": None})
    assert_equal(launch(made | {"dout": ones.expand(made["dout"].shape), "dlse": None}), want)
    want = launch(made | {"dout": torch.zeros_like(made["dout"])})
    assert_equal(launch(made | {"dout": None}), want)


def test_a_finite_bias_is_added_however_large() -> None:
    made = case_of(seq_q=37, bias=(1, 1, 37, 37)).inputs(DEVICE)
    made["bias"][..., 7, :] = torch.finfo(torch.float32).min
    made["bias"][..., 8, :20] = torch.finfo(torch.float32).min
    made["bias"][..., 9, :20] = -torch.inf
    found = launch(made)
    want, lse = reference.attention(
        *(made[name].double() for name in "qkv"), bias=made["bias"].double(), scale=0.2
    )
    torch.testing.assert_close(found["out"].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["lse"].double(), lse, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize(("seq", "stride"), [(5, 2**29), (34, 2**26)], ids=["in a tile", "tiles"])
def test_offsets_past_two_billion_elements(seq: int, stride: int) -> None:
    """Rows so far apart that their offsets pass 2³¹ elements: address space, not memory."""
    made = case_of(heads=1, seq_q=seq, dim=64, dtype=BF16).inputs(DEVICE)
    want = launch(made)
    for name in ("q", "k", "v", "dout"):
        assert_equal(launch(made | {name: compare.far_apart(made[name], stride)}), want)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, (20, None))])
def test_scores_ahead(causal: bool, window: tuple | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """AHEAD, which no first tile of a list has."""
    tile = triton.Config({"BLOCK_M": 32, "BLOCK_N": 16, "AHEAD": True}, num_stages=2)
    monkeypatch.setattr(attention_fwd, "forward_tiles", lambda *args: (tile,))
    case = case_of(
        batch=3,
        heads=1,
        seq_q=35,
        seq_k=59,
        dim=24,
        causal=causal,
        window=window,
        kv_lengths=(0, 32, 59),
    )
    check_attention(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_every_candidate_on_the_gpu(
    dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile alone: timing would hide one that is wrong."""
    case = case_of(heads=4, kv_heads=2, seq_q=391, seq_k=517, dim=dim, dtype=dtype, causal=True)
    for choice in range(4):
        monkeypatch.setattr(
            Tuner, "pick", lambda self, candidates, n=choice, **_: candidates[n % len(candidates)]
        )
        check_attention(case, "triton")


@pytest.mark.gpu
def test_more_heads_than_a_grid_dimension_has() -> None:
    case = case_of(batch=70_000, heads=1, seq_q=1, seq_k=2, dim=16, dtype=FP16)
    check_attention(case, "triton")


@pytest.mark.gpu
def test_gradients_are_bitwise_repeatable() -> None:
    case = case_of(heads=8, kv_heads=2, seq_q=1000, dim=64, dtype=BF16, bias=(1, 8, 1, 1000))
    made = case.inputs(DEVICE)
    want = launch(made)
    for _ in range(20):
        assert_equal(launch(made), want)
