"""Attention in CUDA C++ where the keys are split between blocks: few queries of many keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import fusedattn
import pytest
import torch
from cases import on
from cases.attention import AttentionCase, check_attention, eager_results, oracle, regimes
from compare import LSE_FLOORS, check, device_for
from fusedattn import _native
from test_cuda_attention_backward import BF16, BOTH, F16, LITTLE
from test_cuda_rowwise import set_device
from torch import Tensor

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")
emulated = _native.cuda_emulated()
needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

CASES = regimes(
    ("one_query", {"seq_q": 1, "seq_k": 520}),
    ("f16", {"seq_q": 20, "seq_k": 700, "dtype": F16}),
    ("causal", {"seq_q": 40, "seq_k": 540, "causal": True}),
    ("top_left_leaves_parts_without_keys", {"seq_q": 30, "seq_k": 540, "causal": "top_left"}),
    ("one_query_top_left", {"heads": 4, "kv_heads": 2, "seq_q": 1, "seq_k": 520, "dim": 24,
                            "causal": "top_left"}),
    ("one_query_gqa", {"batch": 2, "heads": 6, "kv_heads": 2, "seq_q": 1, "seq_k": 600,
                       "dim": 16, "causal": True}),
    ("gqa", {"heads": 4, "kv_heads": 2, "seq_q": 5, "seq_k": 520, "dim": 24,
             "causal": True}),
    ("kv_lengths", {"batch": 3, "heads": 1, "seq_q": 3, "seq_k": 640, "kv_lengths": (65, 0, 600)}),
    ("kv_lengths_causal", {"batch": 2, "heads": 1, "seq_q": 70, "seq_k": 520, "causal": True,
                           "kv_lengths": (470, 520)}),
    ("one_query_kv_lengths_gqa", {"batch": 2, "heads": 4, "kv_heads": 1, "seq_q": 1, "seq_k": 900,
                                  "dim": 16, "kv_lengths": (1, 899)}),
    ("rows_that_see_nothing", {"batch": 2, "seq_q": 2, "seq_k": 520, "dim": 24,
                               "kv_lengths": (0, 0)}),
    ("softcap", {"seq_q": 9, "seq_k": 520, "softcap": 1.5}),
    ("lse_of_parts_far_apart", {"seq_q": 9, "seq_k": 780, "scale": 30.0, "dtype": F16}),
    ("scale_negative", {"seq_q": 9, "seq_k": 520, "scale": -0.3}),
    ("two_tiles_of_queries", {"heads": 1, "seq_q": 140, "seq_k": 520, "causal": True}),
    ("dim_72_40", {"heads": 1, "seq_q": 9, "seq_k": 520, "dim": 72, "dim_v": 40}),
    ("dim_40_88", {"heads": 1, "seq_q": 9, "seq_k": 520, "dim": 40, "dim_v": 88}),
    ("dim_128", {"heads": 1, "seq_q": 9, "seq_k": 400, "dim": 128, "causal": True}),
    ("dim_192_128", {"heads": 1, "seq_q": 1, "seq_k": 520, "dim": 192, "dim_v": 128}),
    ("dim_256", {"heads": 1, "seq_q": 1, "seq_k": 520, "dim": 256}),
    dtype=BF16, batch=1, dim=64,
)  # fmt: skip


def forward(made: dict, case: AttentionCase, backend: str = "cuda_emulated") -> dict[str, Tensor]:
    given = {name: made[name] for name in ("q", "k", "v", "kv_lengths")}
    found = fusedattn.attention(**given, **case.options(), return_lse=True, backend=backend)
    return dict(zip(("out", "lse"), found, strict=True))


def check_forward(case: AttentionCase, backend: str) -> None:
    made = case.inputs()
    found = forward(on(device_for(backend), made), case, backend)
    want, eager = oracle(made, case), eager_results(made, case)
    for name, floor in {"out": 0.0, "lse": LSE_FLOORS[case.dtype]}.items():
        check(found[name], want[name], eager[name], what=name, case=str(case), floor=floor)


@pytest.mark.parametrize("case", CASES)
def test_split(case: AttentionCase, backend: str) -> None:
    set_device(backend, multiprocessors=9)
    check_forward(case, backend)


def test_gradients_from_the_lse_of_a_split(backend: str) -> None:
    set_device(backend, multiprocessors=9)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 1, "seq_k": 520, "dim": 24}
    check_attention(AttentionCase(**sizes, dtype=BF16, causal=True, grads=BOTH), backend)


@needs_emulator
@pytest.mark.parametrize("dim", [96, 256])
def test_split_in_little_memory(dim: int) -> None:
    emulated.device(multiprocessors=9, max_shared_bytes=LITTLE)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 1, "seq_k": 520, "dim": dim}
    check_forward(AttentionCase(**sizes, dtype=F16), "cuda_emulated")


@pytest.fixture
def asked() -> Iterator[list[int]]:
    """Bytes of each workspace: a forward has one where the keys are split."""
    sizes: list[int] = []

    def allocate(size: int, *where: int) -> Tensor:
        sizes.append(size)
        return _native.emulated_workspace(size, *where)

    emulated.allocate_by(allocate)
    yield sizes
    emulated.allocate_by(_native.emulated_workspace)


@needs_emulator
@pytest.mark.parametrize(
    ("multiprocessors", "parts"), [(1, 1), (2, 2), (3, 3), (4, 3), (100, 3)]
)  # fmt: skip
def test_split_only_where_blocks_are_few(multiprocessors: int, parts: int, asked: list) -> None:
    """Two heads, two blocks to a multiprocessor, and four tiles of 64 keys at least in a part."""
    emulated.device(multiprocessors=multiprocessors)
    case = AttentionCase(batch=1, heads=2, seq_q=20, seq_k=800, dim=64, dtype=BF16)
    forward(case.inputs(), case)
    assert asked == ([] if parts == 1 else [parts * 2 * 20 * (64 + 1) * 4])


@needs_emulator
@pytest.mark.parametrize(("causal", "blocks"), [(False, 1), (True, 1), ("top_left", 8)])
def test_one_query_of_all_heads_of_a_group_is_one_block(causal, blocks: int, asked: list) -> None:
    emulated.device(multiprocessors=4)
    case = AttentionCase(batch=1, heads=8, kv_heads=1, seq_q=1, seq_k=700, dim=64, dtype=BF16,
                         causal=causal)  # fmt: skip
    forward(case.inputs(), case)
    assert asked == ([2 * 8 * (64 + 1) * 4] if blocks == 1 else [])


@needs_emulator
def test_split_results_are_the_same_each_time() -> None:
    case = AttentionCase(batch=1, heads=1, seq_q=10, seq_k=1100, dim=64, dtype=F16)
    made = case.inputs()

    def results(seed: int) -> dict[str, Tensor]:
        emulated.seed(seed)
        return forward(made, case)

    want = results(0)
    for seed in range(1, 4):
        assert all(torch.equal(x, want[name]) for name, x in results(seed).items())


def test_split_of_nan(backend: str) -> None:
    """A NaN query reaches its own row and no other."""
    set_device(backend, multiprocessors=9)
    case = AttentionCase(batch=1, heads=4, kv_heads=2, seq_q=1, seq_k=520, dim=24, dtype=BF16)
    made = case.inputs(device_for(backend))
    want = forward(made, case, backend)
    made["q"][0, 1] = torch.nan
    found = forward(made, case, backend)
    for name in ("out", "lse"):
        assert found[name][0, 1].isnan().all()
        assert torch.equal(found[name][0, 2:], want[name][0, 2:])
        assert torch.equal(found[name][0, 0], want[name][0, 0])


# --- csrc/cuda/attention_schedule.h --------------------------------------------------------------


@needs_emulator
def test_parts_hold_every_tile_once() -> None:
    for tiles, parts in itertools.product(range(30), range(1, 12)):
        for first in (0, 5):
            found = [emulated.part_of(first, first + tiles, i, parts) for i in range(parts)]
            all_tiles = [t for begin, end in found for t in range(begin, end)]
            assert all_tiles == list(range(first, first + tiles))


@needs_emulator
def test_parts_fill_the_device_and_none_is_empty() -> None:
    for blocks, wave, tiles in itertools.product([1, 2, 7, 64, 300], [6, 132, 264], range(1, 200)):
        parts = emulated.parts_of(blocks, wave, tiles)
        assert parts == 1 or parts * blocks <= wave
        assert parts == 1 or parts * 4 <= tiles
        assert all(begin < end for begin, end in
                   (emulated.part_of(0, tiles, i, parts) for i in range(parts)))  # fmt: skip
    assert emulated.parts_of(8, 264, 86) == 18
