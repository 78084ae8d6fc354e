"""csrc/cuda/attention_schedule.h against brute force: which tiles are skipped, masked, full.

Each pair that may attend is computed exactly once, in a tile of queries as in a tile of keys; no
tile that goes without a mask holds a pair that may not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fusedattn import _native
from torch import Tensor

emulated = _native.cuda_emulated()

pytestmark = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}
# The sizes of the table of tiles, and small ones that divide nothing.
TILES = [(128, 64), (128, 32), (64, 64), (64, 128), (32, 32), (16, 8), (3, 5), (7, 2), (1, 1)]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
SMALL = range(1, 11)
ALL = (-1, -1)  # no window


def allowed(
    seq_q: int, seq_k: int, causal: str, keys: int, window: tuple[int, int] = ALL
) -> Tensor:
    """(seq_q, seq_k) bool: which pairs attend, by the definition."""
    i, j = torch.arange(seq_q)[:, None], torch.arange(seq_k)[None]
    right = j - i - (0 if causal == "top_left" else seq_k - seq_q)  # of the diagonal
    seen = (j < keys).expand(seq_q, seq_k)
    if causal != "none":
        seen = seen & (right <= 0)
    elif window[1] >= 0:
        seen = seen & (right <= window[1])
    return seen & (right >= -window[0]) if window[0] >= 0 else seen


def counts(pairs: Tensor, rows: int, width: int, keys: int) -> tuple[Tensor, Tensor]:
    """Of each tile (tile of queries, tile of keys): its pairs that attend, and whether it is full:
    no key is missing and each of its queries that exist sees each key."""
    seq_q, seq_k = pairs.shape
    down, across = -(-seq_q // rows), -(-seq_k // width)
    padded = torch.zeros(down * rows, across * width, dtype=torch.int64)
    padded[:seq_q, :seq_k] = pairs
    sums = padded.view(down, rows, across, width).sum((1, 3))
    queries = torch.full((down,), rows)
    queries[-1] = seq_q - (down - 1) * rows
    return sums, sums == queries[:, None] * width


def check_one_direction(
    visit: tuple[int, int, int, int], seen: Tensor, full: Tensor, case: str
) -> None:
    """The tiles [begin, end) visited and [full_begin, full_end) not masked, against brute force."""
    begin, full_begin, full_end, end = visit
    tile = torch.arange(len(seen))
    visited = (tile >= begin) & (tile < end)
    unmasked = visited & (tile >= full_begin) & (tile < full_end)
    assert begin >= 0, f"{case}: {visit}"
    assert end <= len(seen), f"{case}: {visit}"
    assert not seen[~visited].any(), f"{case}: a tile is skipped that holds a pair, {visit}"
    assert not (unmasked & ~full).any(), f"{case}: a tile without a mask is not full, {visit}"
    # Exact as well: nothing is computed in vain.
    assert seen[visited].all(), f"{case}: a tile is visited that holds no pair, {visit}"
    assert full[visited & ~unmasked].sum() == 0, f"{case}: a full tile is masked, {visit}"


def check_schedule(
    seq_q: int,
    seq_k: int,
    causal: str,
    keys: int,
    rows: int,
    width: int,
    window: tuple[int, int] = ALL,
) -> None:
    case = f"Sq={seq_q} Sk={seq_k} causal={causal} keys={keys} {window=} tiles {rows}×{width}"
    sums, full = counts(allowed(seq_q, seq_k, causal, keys, window), rows, width, keys)
    shape = (seq_q, seq_k, CAUSAL[causal], keys)
    for i in range(sums.shape[0]):
        visit = emulated.key_tiles(*shape, i * rows, rows, width, *window)
        check_one_direction(visit, sums[i], full[i], f"{case}, queries from {i * rows}")
    for j in range(sums.shape[1]):
        visit = emulated.query_tiles(*shape, j * width, rows, width, *window)
        check_one_direction(visit, sums[:, j], full[:, j], f"{case}, keys from {j * width}")


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("rows", "width"), TILES[:5])
def test_lengths(causal: str, rows: int, width: int) -> None:
    for seq_q, seq_k in itertools.product(LENGTHS, LENGTHS):
        check_schedule(seq_q, seq_k, causal, seq_k, rows, width)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("rows", "width"), TILES[6:])
def test_every_small_shape_and_kv_length(causal: str, rows: int, width: int) -> None:
    for seq_q, seq_k in itertools.product(SMALL, SMALL):
        for keys in range(seq_k + 1):
            check_schedule(seq_q, seq_k, causal, keys, rows, width)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("rows", "width"), TILES[:6])
def test_kv_lengths(causal: str, rows: int, width: int) -> None:
    for keys in (0, 1, 31, 32, 33, 64, 100, 128, 150, 199, 200):
        for seq_q in (1, 65, 130, 200, 300):
            check_schedule(seq_q, 200, causal, keys, rows, width)


WINDOWS = [(0, 0), (1, 0), (0, 2), (3, -1), (-1, 1), (2, 4), (9, 9)]


@pytest.mark.parametrize("causal", CAUSAL)
def test_windows_of_every_small_shape(causal: str) -> None:
    for seq_q, seq_k, window in itertools.product(range(1, 8), range(1, 8), WINDOWS):
        for keys in {seq_k, seq_k // 2}:
            check_schedule(seq_q, seq_k, causal, keys, 3, 2, window)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("rows", "width"), [(128, 64), (64, 32)])
def test_windows(causal: str, rows: int, width: int) -> None:
    windows = [(0, 0), (31, 0), (32, 33), (63, 64), (64, -1), (65, 1), (-1, 63), (300, 300)]
    for seq_q, seq_k, window in itertools.product((1, 64, 129, 200), (1, 65, 128, 200), windows):
        check_schedule(seq_q, seq_k, causal, seq_k, rows, width, window)


@pytest.mark.parametrize("by", [-1, 1])
def test_schedule_off_by_one_is_caught(by: int) -> None:
    shape = (160, 224, CAUSAL["bottom_right"], 200)
    sums, full = counts(allowed(160, 224, "bottom_right", 200), 32, 16, 200)
    queries_of = emulated.query_tiles(*shape, 128, 32, 16, *ALL), sums[:, 8], full[:, 8], (0, 1, 3)
    keys_of = emulated.key_tiles(*shape, 64, 32, 16, *ALL), sums[2], full[2], (2, 3)
    for visit, seen, whole, bounds in (queries_of, keys_of):
        check_one_direction(visit, seen, whole, "right")
        for which in bounds:
            wrong = list(visit)
            wrong[which] += by
            with pytest.raises(AssertionError, match=r"wrong: (a tile|a full tile|\()"):
                check_one_direction(tuple(wrong), seen, whole, "wrong")


def test_long_sequences_do_not_overflow() -> None:
    n = 1 << 30
    last = n // 64
    assert emulated.key_tiles(n, n, 2, n, n - 128, 128, 64, *ALL) == (0, 0, last - 2, last)
    assert emulated.query_tiles(n, n, 2, n, n - 64, 64, 64, *ALL) == tuple(
        last - 1 + x for x in (0, 1, 1, 1)
    )
    begin = emulated.key_tiles(n, n, 0, n, n - 128, 128, 64, 2**40, 2**40)
    assert begin == (0, 0, last, last)
    assert emulated.key_tiles(n, n, 0, n, n - 128, 128, 64, 64, 0) == (
        last - 3,
        last - 1,
        last - 2,
        last,
    )


@pytest.mark.parametrize("tiles", [1, 2, 7])
@pytest.mark.parametrize(("heads", "section"), [(1, 1), (1, 8), (8, 8), (12, 8), (17, 4), (5, 1)])
def test_each_block_has_its_work(tiles: int, heads: int, section: int) -> None:
    work = [emulated.work_of(block, tiles, heads, section) for block in range(tiles * heads)]
    assert set(work) == set(itertools.product(range(tiles), range(heads)))
    for first in range(0, heads, section):  # within a section the longest tiles come first
        mine = [tile for tile, head in work if first <= head < first + section]
        assert mine == sorted(mine, reverse=True)
    assert [head // section for _, head in work] == sorted(head // section for _, head in work)


KB, MB = 1 << 10, 1 << 20
CACHES = [4 * MB, 16 * MB, 50 * MB, 126 * MB]  # of GPUs, second-level


@pytest.mark.parametrize("cache", CACHES)
def test_sections_fill_half_of_the_cache(cache: int) -> None:
    """As many heads as fit, but one at least, and no more than there are."""
    for heads, each in itertools.product([1, 2, 5, 16, 1024], [1, KB, MB, 3 * MB, 8 * MB, 64 * MB]):
        section = emulated.section_of(heads, each, cache)
        assert 1 <= section <= heads
        assert section == 1 or section * each <= cache / 2
        assert section == heads or (section + 1) * each > cache / 2


@pytest.mark.parametrize("by", [-1, 0, 1])
def test_section_where_one_head_just_fits(by: int) -> None:
    assert emulated.section_of(8, 8 * MB + by, 16 * MB) == 1
    assert emulated.section_of(8, 4 * MB + by, 16 * MB) == (1 if by > 0 else 2)


def test_section_of_long_sequences_does_not_overflow() -> None:
    assert emulated.section_of(3, 1 << 62, 16 * MB) == 1
    assert emulated.section_of(1 << 40, 1, 16 * MB) == 8 * MB


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("heads", "each"), [(12, MB), (12, 3 * MB), (7, 16 * MB), (4, KB)])
def test_blocks_of_other_sections_wait(heads: int, each: int, cache: int) -> None:
    """What the blocks that follow each other read, tiles · section of them, fits in the cache."""
    tiles, section = 5, emulated.section_of(heads, each, cache)
    work = [emulated.work_of(block, tiles, heads, section) for block in range(tiles * heads)]
    for i in range(0, len(work), tiles * section):
        together = {head for _, head in work[i : i + tiles * section]}
        assert together == set(range(min(together), min(together) + len(together)))
        assert len(together) == 1 or len(together) * each <= cache / 2
