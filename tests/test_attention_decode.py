"""Attention on a cache: against `attention` on the keys that there are, in pages and not."""

from __future__ import annotations

import itertools
from typing import Any

import fusedattn
import pytest
import torch
from compare import check, device_for
from fusedattn import attention, attention_decode
from fusedattn.nn import KVCache, PagedKVCache
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LENGTHS = (0, 17, 60)
ROOM = 80


class Cached:
    """A cache with keys of `LENGTHS`, NaN elsewhere, queries and new keys, and the keys of each."""

    def __init__(
        self, dtype: torch.dtype, seq: int, *, heads: int = 4, page: int | None = None,
        dim: int = 24, dim_v: int = 16, device: str = "cpu",
    ) -> None:  # fmt: skip
        batch, heads_kv = len(LENGTHS), 2

        def made(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, dtype)

        self.q = made(batch, heads, seq, dim)
        self.k, self.v = made(batch, heads_kv, seq, dim), made(batch, heads_kv, seq, dim_v)
        self.lengths = torch.tensor(LENGTHS, device=device)
        self.table = None
        whole = [made(batch, heads_kv, ROOM, n) for n in (dim, dim_v)]
        for b, length in enumerate(LENGTHS):
            for x in whole:
                x[b, :, length:] = float("nan")
        self.keys = [
            [torch.cat((x[b : b + 1, :, :n], new[b : b + 1]), 2) for b, n in enumerate(LENGTHS)]
            for x, new in zip(whole, (self.k, self.v), strict=True)
        ]
        self.caches = whole
        if page is not None:
            each = -(-ROOM // page)
            self.table = torch.randperm(batch * each, device=device).view(batch, each)
            self.caches = []
            for x in whole:
                pages = x.new_full((batch * each + 1, heads_kv, page, x.shape[3]), float("nan"))
                for b, j in itertools.product(range(batch), range(ROOM)):
                    pages[self.table[b, j // page], :, j % page] = x[b, :, j]
                self.caches.append(pages)
            used = torch.arange(each, device=device) * page < self.lengths[:, None] + seq
            self.table = torch.where(used, self.table, 10**6)  # which nobody may look at

    def decode(self, **options: Any) -> Any:
        return attention_decode(
            self.q, *self.caches, self.lengths, block_table=self.table, return_lse=True,
            **{"k": self.k, "v": self.v} | options,
        )  # fmt: skip

    def expected(self, dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, ...]:
        """By `attention` on each sequence, in `dtype`."""
        if dtype is F64:
            tensors = {n: x for n, x in options.items() if isinstance(x, Tensor)}
            options |= {n: x.double() for n, x in tensors.items() if x.is_floating_point()}
        each = []
        for b, (k, v) in enumerate(zip(*self.keys, strict=True)):
            own = dict(options)
            if (mask := own.get("mask")) is not None:
                own["mask"] = mask[b : b + 1, ..., : k.shape[2]]
            q, k, v = (x.to(dtype or x.dtype).cpu() for x in (self.q[b : b + 1], k, v))
            each.append(attention(q, k, v, causal=own.pop("causal", True), return_lse=True, **own))
        return tuple(torch.cat(x) for x in zip(*each, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (7, None)},
    "window to both sides": {"causal": False, "window": (20, 1)},
    "softcap, slopes, sinks": {
        "softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4),
    },
    "mask": {"mask": torch.rand(len(LENGTHS), 1, 1, ROOM) > 0.3},
    "scale of heads": {"scale": torch.rand(4)},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(("page", "seq"), [(None, 1), (16, 5)], ids=["one query", "five, pages"])
def test_options(backend: str, options: dict, page: int | None, seq: int) -> None:
    if backend == "cuda_emulated":
        pytest.skip("takes no cache")
    case = Cached(F32, seq, page=page, device=device_for(backend))
    given = {n: x.to(case.q.device) if isinstance(x, Tensor) else x for n, x in options.items()}
    out, lse = case.decode(backend=backend, **given)
    reference = case.expected(F64, backend="reference", **options)
    eager = case.expected(F32, backend="reference", **options)
    for name, found, want, plain in zip(("out", "lse"), (out, lse), reference, eager, strict=True):
        check(found, want, plain, what=name, case=(options, page, seq))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("page", [None, 1, 5, 16, 64])
def test_the_cpu_gives_the_bits_of_attention(dtype: torch.dtype, page: int | None) -> None:
    """Of few queries and of many, whole vectors and not, grouped and not."""
    for seq, heads, dim in ((1, 4, 32), (3, 2, 20), (20, 8, 64)):
        case = Cached(dtype, seq, heads=heads, page=page, dim=dim)
        for found, want in zip(case.decode(), case.expected(), strict=True):
            assert torch.equal(found, want), (seq, heads, dim)


@pytest.mark.parametrize("case", [(BF16, 3, 5), (F16, 1, None), (F32, 70, 16)], ids=str)
def test_triton(case: tuple) -> None:
    pytest.importorskip("triton")
    dtype, seq, page = case
    made = Cached(dtype, min(seq, 20), heads=8, page=page, dim=40, dim_v=72)
    out, lse = made.decode(backend="triton", window=(30, None), sinks=torch.zeros(8))
    options = {"window": (30, None), "sinks": torch.zeros(8), "backend": "reference"}
    want, plain = made.expected(F64, **options), made.expected(**options)
    check(out, want[0], plain[0], what="out", case=case)
    check(lse, want[1], plain[1], what="lse", case=case)


def test_keys_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between programs of Triton's, and parts of the CPU's, some of which have no key."""
    pytest.importorskip("triton")
    from fusedattn.kernels import attention_decode as kernel

    monkeypatch.setattr(kernel, "LEAST_KEYS", 8)
    case = Cached(F32, 1)
    want = case.expected(F64)
    for found, ref in zip(case.decode(backend="triton"), want, strict=True):
        torch.testing.assert_close(found.double(), ref, rtol=1e-5, atol=1e-5)
    q = torch.randn(1, 1, 1, 32)
    k, v = torch.randn(2, 1, 1, 3000, 32)
    for length in (1, 255, 256, 257, 2999):
        found = attention_decode(q, k, v, torch.tensor([length]))
        assert torch.equal(found, attention(q, k[:, :, :length], v[:, :, :length]))
    monkeypatch.setattr(kernel, "LEAST_KEYS", 1500)  # several tiles for each program
    other = attention_decode(q, k, v, torch.tensor([2999]), backend="triton")
    torch.testing.assert_close(other, found, rtol=1e-5, atol=1e-5)


def test_rotary_turns_what_is_new() -> None:
    case = Cached(F32, 3, dim=16)
    phase = torch.outer(torch.arange(ROOM), 10000.0 ** (-torch.arange(8) / 8))
    cos, sin = phase.cos(), phase.sin()
    before = [x.clone() for x in case.caches]
    out, _ = case.decode(cos=cos, sin=sin)
    for b, length in enumerate(LENGTHS):
        positions = torch.arange(length, length + 3)[None]
        q, k = (
            fusedattn.apply_rotary(x[b : b + 1], cos, sin, positions=positions)
            for x in (case.q, case.k)
        )
        keys = torch.cat((before[0][b : b + 1, :, :length], k), 2)
        assert torch.equal(case.caches[0][b, :, length : length + 3], k[0])
        assert torch.equal(out[b : b + 1], attention(q, keys, case.keys[1][b], causal=True))


def test_nothing_is_written_but_the_new_rows() -> None:
    for page in (None, 5):
        case = Cached(F32, 2, page=page)
        before = [x.clone() for x in case.caches]
        case.decode()
        for x, y, new in zip(case.caches, before, (case.k, case.v), strict=True):
            changed = ~((x == y) | (x.isnan() & y.isnan()))
            assert int(changed.sum()) == new.numel()


def test_under_compile_autocast_and_inference_mode() -> None:
    case = Cached(BF16, 1, page=16)
    want = case.decode()[0]
    compiled = torch.compile(
        lambda q, k, v, lengths, table: attention_decode(q, k, v, lengths, block_table=table),
        fullgraph=True,
    )
    lengths = case.lengths + 1
    with torch.inference_mode():
        assert torch.equal(compiled(case.q, *case.caches, lengths, case.table), want)
    with torch.autocast("cpu", torch.bfloat16):
        q = case.q.float()
        found = attention_decode(q, *case.caches, lengths, block_table=case.table)
    assert torch.equal(found, want)


def test_a_cache_grows_and_is_cropped_and_reordered() -> None:
    cache = KVCache(2, 1, 8, room=4, head_dim_v=16)
    keys, values = torch.randn(2, 1, 30, 8), torch.randn(2, 1, 30, 16)
    q = torch.randn(2, 2, 30, 8)
    parts = [
        cache.attend(q[:, :, a:b], keys[:, :, a:b], values[:, :, a:b])
        for a, b in itertools.pairwise((0, 3, 4, 5, 20, 30))
    ]
    want = attention(q, keys, values, causal=True)
    torch.testing.assert_close(torch.cat(parts, 2), want)
    assert cache.room >= 30
    assert cache.lengths.tolist() == [30, 30]
    cache.crop(torch.tensor([7, 40]))
    cache.reorder(torch.tensor([1, 0, 0]))
    assert cache.lengths.tolist() == [30, 7, 7]
    assert torch.equal(cache.k[0, :, :30], keys[1])
    assert torch.equal(cache.v[2, :, :7], values[0, :, :7])
    cache.reset()
    first = cache.attend(*(x[[0, 1, 1]] for x in (q[:, :, :1], keys[:, :, :1], values[:, :, :1])))
    torch.testing.assert_close(first[0], values[0, :, :1].expand(2, 1, 16))
    assert not cache.state_dict()


def test_a_cache_in_compiled_steps() -> None:
    """One graph for the prompt, one for all steps; then it grows again."""
    inputs = [(torch.randn(2, 4, n, 16), *torch.randn(2, 2, 2, n, 16)) for n in (5, *[1] * 12)]
    caches = [KVCache(2, 2, 16, room=16) for _ in range(2)]
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(lambda *x: caches[0].attend(*x).sin(), backend=counter, fullgraph=True)
    for x in inputs[:-1]:
        assert torch.equal(step(*x), caches[1].attend(*x).sin())
    assert counter.frame_count == 2
    # A graph that fails leaves the grad mode that it had set.
    with torch.no_grad(), pytest.raises(IndexError, match="out of bounds"):
        step(*inputs[-1])
    for cache in caches:
        cache.attend(*inputs[-1])
    assert torch.equal(*(cache.k[:, :, :17] for cache in caches))
    assert [cache.lengths.tolist() for cache in caches] == [[17, 17]] * 2


def test_forks_share_pages_until_they_write() -> None:
    cache = PagedKVCache(8, 1, 8, page_size=4)
    first = cache.add()
    rows = torch.randn(3, 1, 2, 1, 12, 8)  # q, k, v of two futures with one past
    rows[:, :, 1, :, :6] = rows[:, :, 0, :, :6]
    q, k, v = (x[0] for x in rows)

    def step(sequences: list[int], a: int, b: int) -> Tensor:
        return cache.attend(sequences, *(x[: len(sequences), :, a:b] for x in (q, k, v)))

    step([first], 0, 6)
    assert cache.free_pages == 6
    second = cache.fork(first)
    assert cache.free_pages == 6
    found = torch.cat([step([first, second], a, a + 2) for a in (6, 8, 10)], 2)
    want = attention(q, k, v, causal=True)[:, :, 6:]
    torch.testing.assert_close(found, want)
    assert cache.free_pages == 3  # one page is shared, two are of each
    with pytest.raises(ValueError, match="got 3 free pages, expected 4"):
        step([first, second], 0, 8)
    assert cache.length(first) == 12
    cache.free(first)
    assert cache.free_pages == 5
    cache.crop(second, 3)
    assert cache.free_pages == 7
    cache.reserve(20)
    assert cache.free_pages == 19
    assert torch.equal(cache.k[cache._tables[second][0], :, :3], k[1, :, :3])
    with pytest.raises(ValueError, match=f"got sequence {first}"):
        cache.length(first)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no room": ({"lengths": torch.tensor([0, 79, 3])}, "got lengths from 0 to 79 and 2 new keys"),
    "below zero": ({"lengths": torch.tensor([-1, 0, 3])}, "got lengths from -1"),
    "lengths": ({"lengths": torch.tensor([1])}, r"got lengths of shape \(1,\), expected \(3,\)"),
    "floats": ({"lengths": torch.rand(3)}, "lengths"),
    "k alone": ({"v": None}, "got one of k and v"),
    "shape of v": ({"v": torch.zeros(3, 2, 2, 24)}, r"got v of shape \(3, 2, 2, 24\)"),
    "page": ({"block_table": torch.full((3, 40), 99)}, "got block_table with page 99"),
    "shared page": (
        {"block_table": torch.zeros(3, 40, dtype=torch.int32)}, "two sequences write to one page",
    ),
    "table": ({"block_table": torch.zeros(40, dtype=torch.int32)}, "block_table of shape"),
    "cos alone": ({"cos": torch.zeros(90, 4)}, "got one of cos and sin"),
    "causal": ({"causal": "top_left"}, "causal"),
    "backend": ({"backend": "cuda"}, "backend"),
    "gradient": ({"q": torch.zeros(3, 4, 2, 24, requires_grad=True)}, "no_grad"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, message = BAD[name]
    case = Cached(F32, 2, page=5 if "block_table" in changes else None)
    before = [x.clone() for x in case.caches]
    given = {"q": case.q, "lengths": case.lengths, "k": case.k, "v": case.v, "block_table": None}
    given |= {"k_cache": case.caches[0], "v_cache": case.caches[1]} | changes
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        attention_decode(**given)
    for x, y in zip(case.caches, before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
