"""The interface of flash-attn: layouts, return values, the cache, and the module in its place."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from typing import Any

import fusedattn
import pytest
import torch
from fusedattn.integrations import flash_attn as fa
from fusedattn.reference import functional as reference
from torch import Tensor

CLOSE = {"rtol": 0, "atol": 1e-5}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def of_heads(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, more keys": {"causal": True},
    "window, slopes": {"window_size": (9, 3), "alibi_slopes": torch.tensor([0.1, 0.2, 0.0, 0.4])},
    "softcap, scale, causal window": {
        "softcap": 3.0, "softmax_scale": 0.3, "causal": True, "window_size": (5, -1),
    },
}  # fmt: skip


def in_our_words(given: dict[str, Any]) -> dict[str, Any]:
    names = {"softmax_scale": "scale"}
    options = {names.get(name, name): x for name, x in given.items() if name != "window_size"}
    if "window_size" in given:
        options["window"] = tuple(None if x < 0 else x for x in given["window_size"])
    return options


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_padded(given: dict[str, Any]) -> None:
    q, k, v = random(2, 11, 4, 16), random(2, 23, 2, 16, seed=1), random(2, 23, 2, 16, seed=2)
    want, want_lse = reference.attention(*of_heads(q, k, v), **in_our_words(given))
    out, lse, probabilities = fa.flash_attn_func(q, k, v, **given, return_attn_probs=True)
    torch.testing.assert_close(out, want.transpose(1, 2), **CLOSE)
    torch.testing.assert_close(lse, want_lse, **CLOSE)
    assert probabilities is None
    packed = fa.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **given)
    assert torch.equal(packed, fa.flash_attn_func(q, k, v, **given))


def test_a_query_that_sees_no_key() -> None:
    q, k = random(1, 4, 1, 8), random(1, 2, 1, 8)
    out, lse, _ = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(out[0, :2], torch.zeros(2, 1, 8))
    assert torch.equal(lse[0, 0] == float("inf"), torch.tensor([True, True, False, False]))


def test_packed_in_one_tensor_and_its_gradient() -> None:
    qkv = random(2, 9, 3, 2, 8).requires_grad_()
    out = fa.flash_attn_qkvpacked_func(qkv, causal=True)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    want = fa.flash_attn_func(*parts, causal=True)
    assert torch.equal(out, want)
    out.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(qkv.grad, torch.stack([x.grad for x in parts], 2))  # type: ignore[arg-type]


def test_what_dropout_drops() -> None:
    q = random(1, 8, 2, 16)
    torch.manual_seed(5)
    out, _, s = fa.flash_attn_func(q, q, q, dropout_p=0.4, return_attn_probs=True)
    assert 0.2 < (s < 0).float().mean() < 0.6
    kept = torch.where(s < 0, 0.0, s) / 0.6
    want = torch.einsum("bhij,bjhd->bihd", kept, q)
    torch.testing.assert_close(out, want, **CLOSE)


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_sequences_from_padding_and_back(given: dict[str, Any]) -> None:
    padding = fa._flash_attn_parts
    mask_q, mask_k = (
        torch.arange(n) < torch.tensor(lengths)[:, None]
        for n, lengths in ((11, (11, 4)), (23, (20, 23)))
    )
    q, k, v = random(2, 11, 4, 16), random(2, 23, 4, 16, seed=1), random(2, 23, 4, 16, seed=2)
    rows_q, indices, cu_q, most_q, used = padding.unpad_input(q, mask_q)
    (rows_k, *_), (rows_v, _, cu_k, most_k, _) = (padding.unpad_input(x, mask_k) for x in (k, v))
    assert (cu_q.tolist(), most_q, used.tolist()) == ([0, 11, 15], 11, [11, 4])
    out, lse, _ = fa.flash_attn_varlen_func(
        rows_q, rows_k, rows_v, cu_q, cu_k, most_q, most_k, **given, return_attn_probs=True
    )
    back = padding.pad_input(out, indices, 2, 11)
    for b, (n, m) in enumerate(((11, 20), (4, 23))):
        want = fa.flash_attn_func(q[b : b + 1, :n], k[b : b + 1, :m], v[b : b + 1, :m], **given)
        torch.testing.assert_close(back[b, :n], want[0], **CLOSE)
        assert torch.equal(back[b, n:], torch.zeros_like(back[b, n:]))
    assert lse.shape == (4, 15)
    kv = fa.flash_attn_varlen_kvpacked_func(
        rows_q, torch.stack((rows_k, rows_v), 1), cu_q, cu_k, most_q, most_k, **given
    )
    assert torch.equal(kv, out)


def test_one_offset_for_all_three() -> None:
    qkv = random(12, 3, 2, 8)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, offsets, 7, causal=True)
    want = fa.flash_attn_qkvpacked_func(qkv[None, 5:], causal=True)
    torch.testing.assert_close(out[5:], want[0], **CLOSE)


# --- the cache -----------------------------------------------------------------------------------


def pages_of(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cache (B, S, H, D) in shuffled pages, and its block table."""
    batch, length = cache.shape[:2]
    count = length // size
    table = torch.randperm(batch * count).view(batch, count)
    pages = torch.empty(batch * count, size, *cache.shape[2:])
    pages[table.flatten()] = cache.reshape(batch * count, size, *cache.shape[2:])
    return pages, table.int()


KV = ["contiguous", "picked", "paged"]


@pytest.mark.parametrize("kind", KV)
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_cache(given: dict[str, Any], new: int, kind: str) -> None:
    """New keys go behind each length, and each sequence is as if it were alone."""
    lengths = [7, 20]
    q = random(2, max(new, 1), 4, 16)
    k, v = random(2, 24, 2, 16, seed=1), random(2, 24, 2, 16, seed=2)
    fresh = [random(2, new, 2, 16, seed=s) for s in (3, 4)] if new else [None, None]
    angle = random(40, 4)
    rotary = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()} if new else {}
    where: dict[str, Any] = {}
    caches = [k.clone(), v.clone()]
    if kind == "picked":
        where["cache_batch_idx"] = torch.tensor([2, 0], dtype=torch.int32)
        caches = [torch.stack((x[1], x[0], x[0])) for x in (k, v)]
    if kind == "paged":
        pages, table = pages_of(torch.stack((k, v), 3).flatten(3), 4)
        caches = [x.contiguous() for x in pages.unflatten(3, (2, 16)).unbind(3)]
        where["block_table"] = table
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, *fresh, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), **where,
        **rotary, **given, return_softmax_lse=True,
    )  # fmt: skip
    ordered = given.get("causal", False) or "window_size" in given
    for b, n in enumerate(lengths):
        own_q, own_k, own_v = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        if new:
            turn = fa._flash_attn_parts.apply_rotary_emb
            tables = (angle.cos(), angle.sin(), True)
            added = turn(fresh[0][b : b + 1], *tables, seqlen_offsets=n)
            own_k = torch.cat((own_k, added), 1)
            own_v = torch.cat((own_v, fresh[1][b : b + 1]), 1)
            at = torch.arange(new) * ordered + n
            own_q = fusedattn.apply_rotary(
                own_q.transpose(1, 2), *tables[:2], interleaved=True, positions=at
            ).transpose(1, 2)
        want, want_lse = reference.attention(*of_heads(own_q, own_k, own_v), **in_our_words(given))
        torch.testing.assert_close(out[b], want[0].transpose(0, 1), **CLOSE)
        torch.testing.assert_close(lse[b], want_lse[0], **CLOSE)
        if new and kind == "contiguous":
            torch.testing.assert_close(caches[0][b, n : n + new], added[0], **CLOSE)
            assert torch.equal(caches[0][b, n + new :], k[b, n + new :])


def test_cache_with_padding_to_the_left_and_all_of_it() -> None:
    q, k, v = random(2, 1, 2, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    out = fa.flash_attn_with_kvcache(q, k, v, cache_leftpad=torch.tensor([0, 4]))
    want = fa.flash_attn_func(q[1:], k[1:, 4:], v[1:, 4:])
    torch.testing.assert_close(out[1:], want, **CLOSE)


def test_pages_of_packed_sequences() -> None:
    k, v = random(2, 8, 2, 8), random(2, 8, 2, 8, seed=1)
    q = random(5, 2, 8)
    pages, table = pages_of(torch.stack((k, v), 3).flatten(3), 4)
    caches = [x.contiguous() for x in pages.unflatten(3, (2, 8)).unbind(3)]
    cu_q, cu_k = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 7, 12]).int()
    out = fa.flash_attn_varlen_func(q, *caches, cu_q, cu_k, 3, 7, causal=True, block_table=table)
    want = fa.flash_attn_func(q[None, 2:], k[1:, :5], v[1:, :5], causal=True)
    torch.testing.assert_close(out[2:], want[0], **CLOSE)


CACHE = torch.zeros(2, 8, 2, 8)
ONE = torch.zeros(2, 1, 2, 8)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"k": ONE, "v": ONE, "cache_seqlens": torch.tensor([3, 8])}, "expected 0 to 8, the"),
    "negative": ({"cache_seqlens": torch.tensor([-1, 8])}, "got cache_seqlens from -1"),
    "no length": ({"k": ONE, "v": ONE}, "got k without cache_seqlens"),
    "one of two": ({"k": ONE, "cache_seqlens": 3}, "got one of k and v"),
    "other heads": ({"k": ONE[:, :, :1], "v": ONE[:, :, :1], "cache_seqlens": 3}, "got k of shape"),
    "lengths of three": ({"cache_seqlens": torch.zeros(3).int()}, "expected (2,)"),
    "no such entry": ({"cache_batch_idx": torch.tensor([0, 2])}, "cache_batch_idx from 0 to 2"),
    "no such page": ({"block_table": torch.tensor([[0], [2]])}, "with page 2, expected 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_written_by_a_bad_call(name: str) -> None:
    given, message = BAD[name]
    caches = [CACHE.clone(), CACHE.clone()]
    ones = {n: x + 1 if n in ("k", "v") else x for n, x in given.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        fa.flash_attn_with_kvcache(ONE, *caches, **ones)
    assert all(torch.equal(x, CACHE) for x in caches)


# --- rotary embedding, norms, and the module -----------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved: bool, inplace: bool) -> None:
    parts = fa._flash_attn_parts
    x, angle = random(2, 6, 3, 12), random(20, 4)
    tables = (angle.cos(), angle.sin(), interleaved)
    offsets = torch.tensor([3, 9])
    want = torch.cat(
        [parts.apply_rotary_emb(x[b : b + 1], *tables, seqlen_offsets=int(offsets[b]))
         for b in range(2)]
    )  # fmt: skip
    for b in range(2):
        plain = reference.apply_rotary(
            x[b].transpose(0, 1), *tables[:2], interleaved=interleaved, offset=int(offsets[b])
        )
        torch.testing.assert_close(want[b], plain.transpose(0, 1), **CLOSE)
    given = x.clone()
    found = parts.apply_rotary_emb(given, *tables, inplace, offsets)
    assert (found.data_ptr() == given.data_ptr()) is inplace
    assert torch.equal(found, want)
    rows = torch.cat((x[0], x[1, :2]))
    cu = torch.tensor([0, 6, 8], dtype=torch.int32)
    packed = parts.apply_rotary_emb(rows.clone(), *tables, inplace, offsets, cu)
    assert torch.equal(packed, torch.cat((want[0], want[1, :2])))


@pytest.mark.parametrize("scale_base", [None, 512])
def test_rotary_embedding(scale_base: float | None) -> None:
    rotary = fa._flash_attn_parts.RotaryEmbedding(8, scale_base=scale_base)
    qkv = random(2, 6, 3, 2, 8)
    q, k, v = (x.clone() for x in qkv.unbind(2))
    found = rotary(qkv, seqlen_offset=3)
    assert found is qkv
    assert torch.equal(found[:, :, 2], v)
    phase = torch.outer(
        torch.arange(9.0).double(), 10000.0 ** (-torch.arange(0, 8, 2) / 8).double()
    )
    scale = 1.0
    if scale_base is not None:
        power = (torch.arange(9.0).double() - 4) / scale_base
        scale = ((torch.arange(0, 8, 2) + 3.2) / 11.2).double() ** power[:, None]
    for x, turned, factor in ((q, found[:, :, 0], scale), (k, found[:, :, 1], 1 / scale)):
        want = reference.apply_rotary(
            x.double().transpose(1, 2), phase.cos() * factor, phase.sin() * factor, offset=3
        )
        torch.testing.assert_close(turned, want.transpose(1, 2).float(), **CLOSE)
    kv = random(2, 6, 2, 2, 8)
    keys = kv[:, :, 0].clone()
    own_q, own_kv = rotary(q, kv, seqlen_offset=torch.tensor([0, 0]), max_seqlen=9)
    assert own_q is q
    assert not torch.equal(own_kv[:, :, 0], keys)


def test_rms_norm() -> None:
    norm = fa._flash_attn_parts.RMSNorm(16)
    x = random(3, 16)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), eps=1e-5), **CLOSE)
    assert torch.equal(norm(x), fa._flash_attn_parts.rms_norm(x, norm.weight, 1e-5))


@pytest.fixture
def installed() -> Iterator[None]:
    fa.install()
    fa.install()
    yield
    fa.uninstall()


def test_as_the_module(installed: None) -> None:
    module: Any = importlib.import_module("flash_attn")
    assert module.flash_attn_func is fa.flash_attn_func
    assert importlib.import_module("flash_attn.bert_padding").unpad_input
    assert importlib.import_module("flash_attn.layers.rotary").RotaryEmbedding
    assert importlib.import_module("flash_attn.ops.rms_norm").RMSNorm
    assert importlib.util.find_spec("flash_attn") is not None
    fa.uninstall()
    assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)


def test_never_over_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", importlib.import_module("types"))
    with pytest.raises(ImportError, match="it is never replaced"):
        fa.install()
