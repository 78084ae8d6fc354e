"""Attention's Triton kernels with tiles that come through tensor descriptors (TMA).

Interpreted where there is no GPU, which checks what TMA asks of addresses and strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.attention import AttentionCase, check_attention
from cases.varlen import VarlenCase, check_varlen
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

from fusedattn.kernels import attention_tiles  # noqa: E402
from fusedattn.kernels.attention_bwd import attention_backward  # noqa: E402
from fusedattn.kernels.attention_fwd import attention_forward  # noqa: E402
from fusedattn.kernels.plans import Launches  # noqa: E402
from test_triton_attention import (  # noqa: E402
    BF16,
    DEVICE,
    FP16,
    assert_equal,
    case_of,
    launch,
)

TMA_CASES = {
    "lengths, one of them 0": case_of(
        batch=2, heads=2, kv_heads=1, seq_q=35, seq_k=40, dim=24, kv_lengths=(0, 33)
    ),
    "window, Dv < D": case_of(
        heads=1, seq_q=35, dim=72, dim_v=40, window=(20, 2), grads=("out", "lse")
    ),
    "causal, slopes, fp16": case_of(
        heads=1, seq_q=41, dim=64, causal=True, alibi_slopes=(1,), dtype=FP16
    ),
}


@pytest.fixture(params=[(), ("AHEAD",)], ids=["", "ahead"])
def descriptors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[bool]]:
    """The lists of tiles begin with TMA; whether each launch came through descriptors."""
    launched = []
    tables = {"FORWARD": request.param, "DKDV": (), "DQ": ()}
    for name, constants in tables.items():
        tiles = ((64, 64, 4, 2, *constants, "TMA"), (64, 64, 4, 2))
        lists = {"fp32": {64: tiles, 128: tiles}, "mma": {64: tiles, 128: tiles}}
        monkeypatch.setattr(attention_tiles, name, lists)
    run = Launches.launch

    def tell(self: Launches, *args: Any, **options: Any) -> None:
        if "BLOCK_N" in options:
            launched.append("TMA" in options)
        run(self, *args, **options)

    monkeypatch.setattr(Launches, "launch", tell)
    found = [attention_tiles.forward_tiles, attention_tiles.dkdv_tiles, attention_tiles.dq_tiles]
    forget = [x.cache_clear for x in found]
    forget += [x.plans.clear for x in (attention_forward, attention_backward)]
    for each in forget:
        each()
    yield launched
    for each in forget:
        each()


@pytest.mark.parametrize("case", TMA_CASES.values(), ids=TMA_CASES)
def test_descriptors(case: AttentionCase, descriptors: list[bool]) -> None:
    check_attention(case, "triton")
    assert descriptors[:3] == [True] * 3


def rows_of(width: int, step: int = 1, first: int = 0) -> Tensor:
    """(1, 1, 33, 24) in NaN."""
    wide = torch.full((1, 33, 1, width), torch.nan, dtype=BF16, device=DEVICE)
    return wide.transpose(1, 2)[..., first : first + 24 * step : step]


ODD = {"q": rows_of(40, first=7), "k": rows_of(25), "v": rows_of(48, 2), "dout": rows_of(64, 2)}


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", ""])
def test_descriptors_where_the_layout_allows(name: str, descriptors: list[bool]) -> None:
    """Else by addresses; who walks over what: k and v, q and dout, k and v."""
    made = case_of(heads=1, seq_q=33, dim=24, dtype=BF16).inputs(DEVICE)
    made["k"] = rows_of(40, first=8).copy_(made["k"])  # rows begin a multiple of 16 bytes apart
    want = launch(made)
    del descriptors[:]
    if name:
        made[name] = ODD[name].copy_(made[name])
    attention_forward.plans.clear()
    attention_backward.plans.clear()
    assert_equal(launch(made), want)
    keys = name not in ("k", "v")
    assert descriptors == [keys, name not in ("q", "dout"), keys]


def test_nothing_past_the_lengths_is_read(descriptors: list[bool]) -> None:
    made = case_of(batch=3, heads=1, seq_q=20, seq_k=40, dim=24, kv_lengths=(0, 7, 33)).inputs(
        DEVICE
    )
    want = launch(made)
    for batch, length in enumerate((0, 7, 33)):
        made["k"][batch, :, length:] = made["v"][batch, :, length:] = torch.nan
    assert_equal(launch(made), want)
    assert descriptors == [True] * 3


def test_descriptors_of_packed_sequences(descriptors: list[bool]) -> None:
    case = VarlenCase(lengths_q=(20, 0, 37, 5), lengths_k=(30, 17, 0, 40), dim=24, causal=True)
    check_varlen(case, "triton")
    assert descriptors[:3] == [True] * 3
