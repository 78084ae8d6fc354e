"""The gradient of attention's bias in CUDA C++: of every shape, in one pass and in order.

Tiles have 64 queries by 64 keys, wider head dims less.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BF16, F16, F32, on
from cases.attention import AttentionCase, check_results, fused, regimes, results
from compare import device_for
from fusedattn import _native
from fusedattn.ops.attention_config import AttentionBackwardCall, configure
from fusedattn.reference import functional as reference
from torch import Tensor

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")
emulated = _native.cuda_emulated()
needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "in order"])

# Without a gradient of lse that of a bias of one column is 0.
case_of = functools.partial(
    AttentionCase, batch=1, heads=2, seq_q=70, seq_k=90, dim=64, dtype=BF16, grads=("out", "lse")
)


def hold(case: AttentionCase, backend: str, deterministic: bool) -> None:
    made = on(device_for(backend), case.inputs())
    found = fused(made, case, backend, deterministic)
    check_results(found, made, case, label=f"{backend} {deterministic=} {case}")


@both_ways
@pytest.mark.parametrize("rows", [False, True], ids=["row", "rows"])
@pytest.mark.parametrize("cols", [False, True], ids=["column", "columns"])
@pytest.mark.parametrize(
    ("batch", "heads"), [(1, 1), (1, 2), (2, 1), (2, 2)], ids=["all", "heads", "batches", "both"]
)
def test_every_shape(batch, heads, rows, cols, deterministic, backend) -> None:
    shape = (batch, heads, 19 if rows else 1, 35 if cols else 1)
    case = case_of(batch=2, kv_heads=1, seq_q=19, seq_k=35, bias=shape, causal=True)
    hold(case, backend, deterministic)


LARGE = {"dtype": F16, "scale": 1e-3, "large": True}
CASES = regimes(
    # Each score has its own element: tiles that nobody visits are zeros.
    ("pairs_causal", {"heads": 1, "seq_q": 140, "seq_k": 140, "causal": True,
                      "bias": (1, 1, 140, 140), "dtype": F16}),
    ("pairs_window_lengths", {"batch": 3, "heads": 1, "seq_q": 130, "window": (20, 4),
                              "kv_lengths": (90, 0, 17), "bias": (3, 1, 130, 90)}),
    ("pairs_top_left", {"heads": 1, "seq_k": 150, "causal": "top_left", "bias": (1, 1, 70, 150),
                        "bias_dtype": F32}),
    ("pairs_groups_dropout_softcap", {"heads": 4, "kv_heads": 2, "dropout_p": 0.3, "softcap": 1.5,
                                      "bias": (1, 4, 70, 90)}),
    # e · ds within the range of fp16.
    ("pairs_large", LARGE | {"seq_q": 40, "bias": (1, 2, 40, 90), "bias_dtype": F32}),
    ("row_large", LARGE | {"seq_q": 40, "bias": (1, 2, 1, 90), "bias_dtype": F32}),
    ("column_large", LARGE | {"seq_q": 40, "bias": (1, 1, 40, 1), "bias_dtype": F32}),
    # Where warps share keys.
    ("pairs_dim_72", {"seq_q": 35, "dim": 72, "bias": (1, 2, 35, 90)}),
    ("pairs_dim_128", {"seq_q": 35, "seq_k": 150, "dim": 128, "bias": (1, 2, 35, 150),
                       "causal": True, "dtype": F16}),
    ("pairs_dim_192", {"seq_q": 35, "dim": 192, "bias": (1, 2, 35, 90)}),
    ("row_dim_192", {"seq_q": 35, "dim": 136, "bias": (1, 1, 1, 90), "dropout_p": 0.3}),
    ("column_dim_192", {"seq_q": 35, "dim": 192, "bias": (1, 2, 35, 1), "dtype": F16}),
    ("row_dim_256", {"seq_q": 35, "seq_k": 40, "dim": 256, "bias": (1, 2, 1, 40), "dtype": F16}),
    ("one_dim_256", {"seq_q": 35, "seq_k": 40, "dim": 256, "bias": (1, 1, 1, 1)}),
    # Summed over the queries of three tiles and all that share an element.
    ("row_window_lengths_slopes", {"batch": 2, "kv_heads": 1, "seq_q": 150, "window": (40, 9),
                                   "kv_lengths": (90, 33), "alibi_slopes": (2,),
                                   "bias": (1, 1, 1, 90)}),
    ("column_groups_dropout", {"heads": 4, "kv_heads": 2, "dropout_p": 0.3,
                               "bias": (1, 1, 70, 1), "bias_dtype": F32}),
    batch=1, heads=2, seq_q=70, seq_k=90, dim=64, dtype=BF16, grads=("out", "lse"),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_in_one_pass(case: AttentionCase, backend: str) -> None:
    hold(case, backend, deterministic=False)


# --- which kernels -------------------------------------------------------------------------------


def launched(case: AttentionCase, deterministic: bool) -> set[str]:
    """The kernels of a forward and a backward."""
    made = case.inputs()
    emulated.watch()
    fused(made, case, "cuda_emulated", deterministic)
    return {flaw.partition(":")[0] for flaw in emulated.flaws()}


IN_ORDER, ROUNDED = "attention_backward_bias", "attention_bias"


@needs_emulator
@pytest.mark.parametrize(
    ("case", "in_order", "further"),
    [(case_of(seq_q=20, seq_k=30, bias=(1, 2, 20, 30)), False, set()),
     (case_of(seq_q=20, seq_k=30, bias=(1, 2, 20, 30)), True, set()),
     (case_of(seq_q=20, seq_k=30, bias=(1, 1, 20, 30)), False, {ROUNDED}),
     (case_of(seq_q=20, seq_k=30, bias=(1, 1, 20, 30), bias_dtype=F32), False, set()),
     (case_of(seq_q=20, seq_k=30, bias=(1, 2, 1, 30), bias_dtype=F32), False, set()),
     (case_of(seq_q=20, seq_k=30, bias=(1, 1, 20, 30)), True, {IN_ORDER})],
    ids=["pairs", "pairs, in order", "heads", "heads, fp32", "row, fp32", "heads, in order"],
)  # fmt: skip
def test_scores_are_computed_once_more_only_for_an_order(case, in_order, further) -> None:
    found = launched(case, in_order)
    assert "attention_backward_keys" in found
    assert found & {IN_ORDER, ROUNDED} == further


# --- memory of any strides -----------------------------------------------------------------------


def strided(like: Tensor, layout: str) -> Tensor:
    batch, heads, rows, cols = like.shape
    if layout == "transposed":
        return like.new_empty(cols, batch, rows, heads).permute(1, 3, 2, 0)
    return like.new_empty(batch, heads, rows + 1, 2 * cols)[:, :, 1:, ::2]


@needs_emulator
@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(1, 2, 20, 30), (1, 1, 20, 30), (1, 2, 1, 30)], ids=str)
@both_ways
def test_any_strides(shape, dtype, layout, deterministic) -> None:
    """The emulator ends a kernel that leaves an element out or writes between two."""
    case = case_of(seq_q=20, seq_k=30, bias=shape, bias_dtype=dtype)
    made = case.inputs()
    found = results(made, case, reference.attention, torch.float32)
    config = configure(case.dim, **case.options(), deterministic=deterministic)
    q, k, v, bias = (made[name] for name in ("q", "k", "v", "bias"))
    call = AttentionBackwardCall(
        made["dout"], made["dlse"], found["out"].to(BF16), found["lse"], q, k, v, bias=bias,
        config=config,
    )  # fmt: skip
    grads = {f"d{name}": torch.empty_like(made[name]) for name in "qkv"}
    grads["dbias"] = strided(bias, layout)
    emulated.attention_backward(call, *grads.values(), None, None)
    check_results(found | grads, made, case, label=f"{layout} {deterministic=} {case}")


# --- the same bits -------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize(
    ("shape", "deterministic"),
    [((2, 2, 70, 90), False), ((2, 2, 70, 90), True), ((1, 2, 70, 90), True),
     ((1, 1, 1, 90), True)],
    ids=["pairs", "pairs, in order", "heads, in order", "row, in order"],
)  # fmt: skip
def test_same_bits_whatever_the_threads_do(shape: tuple[int, ...], deterministic: bool) -> None:
    case = case_of(batch=2, kv_heads=1, bias=shape, bias_dtype=F32)
    made = case.inputs()

    def gradient(seed: int) -> Tensor:
        emulated.seed(seed)
        return fused(made, case, "cuda_emulated", deterministic)["dbias"]

    want = gradient(0)
    assert all(torch.equal(gradient(seed), want) for seed in (1, 2))
