"""Dropout in attention: one mask everywhere, its statistics, its seeds, torch's tools around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusedattn
import pytest
import torch
from compare import device_for
from fusedattn.reference import functional as reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def word(seed: int, i: int, j: int, h: int, b: int) -> int:
    """The random word of one weight, by Python's integers."""
    c, low = [j // 4, i, h, b], 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [y >> 32 ^ c[1] ^ key[0], y & low, x >> 32 ^ c[3] ^ key[1], x & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c[j % 4]


def inputs(
    seq_q: int, seq_k: int, backend: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Of which all weights are 1 / Sk, and the output is what is left of them."""
    q, k = torch.zeros(2, 4, seq_q, 8, dtype=dtype), torch.zeros(2, 2, seq_k, 8, dtype=dtype)
    v = torch.eye(seq_k, dtype=dtype).expand(2, 2, seq_k, seq_k)
    return tuple(x.to(device_for(backend)) for x in (q, k, v))  # type: ignore[return-value]


def check_mask(p: float, seed: int, seq_q: int, seq_k: int, backend: str) -> None:
    """What is left of the weights, and which of them the backward takes."""
    q, k, v = inputs(seq_q, seq_k, backend)
    v = v.contiguous().requires_grad_()
    options = {"dropout_p": p, "seed": seed, "backend": backend}
    out = fusedattn.attention(q, k, v, **options)
    want = reference.attention_dropout(torch.ones(out.shape), p, seed)
    assert torch.equal(out.cpu() != 0, want != 0)
    torch.testing.assert_close(out.cpu() * seq_k, want, rtol=1e-6, atol=0)
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, seq_q - 1, 2), (0, 2, seq_q // 2, seq_k - 1)]:
        assert (want[b, h, i, j] != 0) == (word(seed, i, j, h, b) >= int(p * 2**32))
    if seq_q < seq_k < 100:  # the backward's mask: dv is that of two heads, and so in order
        dout = torch.eye(seq_q, seq_k, device=q.device).expand(out.shape).clone()
        dout[:, 1::2] *= 1000
        (dv,) = torch.autograd.grad(out, v, dout)
        both = want[:, ::2] + 1000 * want[:, 1::2]
        found = dv[..., :seq_q].mT.cpu() * seq_k
        torch.testing.assert_close(found, both, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("p", "seed"), [(0.3, 5), (0.75, -1), (0.3, 2**40 + 3)], ids=["0.3", "0.75", "wide seed"]
)
def test_the_mask_is_the_same_everywhere(p: float, seed: int, any_backend: str) -> None:
    check_mask(p, seed, 21, 35, any_backend)


def test_the_mask_in_decoding(fast_backend: str) -> None:
    check_mask(0.3, -5, 1, 600, fast_backend)


def test_statistics() -> None:
    q, k, v = inputs(400, 500, "cpu", torch.float64)
    out = fusedattn.attention(q, k, v, dropout_p=0.2, seed=11) * 500
    assert (out.unique() - torch.tensor([0.0, 1.25])).abs().max() < 1e-12
    dropped = (out == 0).double()
    assert abs(dropped.mean().item() - 0.2) < 2e-3  # six deviations
    for dim in range(4):  # one row of any kind is no copy of another
        x, y = dropped.narrow(dim, 0, 1), dropped.narrow(dim, 1, 1)
        assert abs((x * y).mean().item() - 0.04) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_everything(dtype: torch.dtype, any_backend: str) -> None:
    device = device_for(any_backend)
    q, k, v = (torch.randn(1, 2, 20, 8, device=device).to(dtype).requires_grad_() for _ in "qkv")
    options = {"return_lse": True, "backend": any_backend}
    out, lse = fusedattn.attention(q, k, v, dropout_p=1.0, **options)
    assert not out.any()
    assert torch.equal(lse, fusedattn.attention(q, k, v, **options)[1])
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))
    found = torch.autograd.grad(lse.sum(), (q, k))
    assert all(x.isfinite().all() and x.any() for x in found)


def test_nothing_is_drawn_without_dropout() -> None:
    q, module = torch.randn(1, 2, 6, 8), fusedattn.nn.MultiheadAttention(8, 2, dropout=0.5).eval()
    before = torch.get_rng_state()
    want = fusedattn.attention(q, q, q)
    for seed in (None, 3):
        assert torch.equal(fusedattn.attention(q, q, q, dropout_p=0.0, seed=seed), want)
    module(q[0], q[0], q[0], need_weights=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_leading_dimensions() -> None:
    q, v = torch.zeros(2, 3, 4, 5, 8), torch.eye(9).expand(2, 3, 1, 9, 9)
    k = torch.zeros(2, 3, 1, 9, 8)
    options = {"dropout_p": 0.5, "seed": 2**63 - 1}
    want = fusedattn.attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options)
    assert torch.equal(fusedattn.attention(q, k, v, **options), want.unflatten(0, (2, 3)))
    one = fusedattn.attention(q[0, 0], k[0, 0], v[0, 0], **options)
    assert torch.equal(one, want[0])
    for seed in (2**63 - 1, torch.tensor(2**63 - 1)):  # in two parts, with k and v of one batch
        out = fusedattn.attention(q, k[:, :1], v[:, :1], dropout_p=0.5, seed=seed)
        assert out[0, 0].any()
        assert not torch.equal(out[0] != 0, out[1] != 0)


def draw(q: Tensor, **options: Any) -> Tensor:
    return fusedattn.attention(q, q, q, dropout_p=0.5, **options)


def test_seeds() -> None:
    q = torch.randn(1, 2, 6, 8)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(draw(q))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(draw(q), draw(q))
    assert torch.equal(draw(q, seed=torch.tensor(-9, dtype=torch.int32)), draw(q, seed=-9))
    assert not torch.equal(draw(q, seed=2**32 + 9), draw(q, seed=9))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant: bool) -> None:
    x, grads = torch.randn(1, 2, 6, 8), []
    for run in (draw, lambda x: checkpoint(draw, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        q = x.clone().requires_grad_()
        run(q).square().sum().backward()  # the reentrant kind knows no torch.autograd.grad
        grads.append(q.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "given"])
def test_compile(seed: int | None, dynamic: bool) -> None:
    def run(q: Tensor, seed: Tensor | None) -> Tensor:
        return draw(q, seed=seed).square()

    compiled: Callable[..., Tensor] = torch.compile(
        run, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for n in (6, 9):
        q = torch.randn(1, 2, n, 8, requires_grad=True)
        given = None if seed is None else torch.tensor(seed)
        results = []
        for each in (run, compiled):
            torch.manual_seed(n)
            out = each(q, given)
            results.append((out, *torch.autograd.grad(out.sum(), q)))
        for x, want in zip(*results, strict=True):
            assert torch.equal(x, want)
    assert seed is not None or not torch.equal(compiled(q, None), compiled(q, None))


def test_vmap_over_drawn_seeds_asks_for_randomness() -> None:
    q = torch.randn(3, 1, 2, 6, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(q)
    same = torch.vmap(draw, randomness="same")(q[:1].expand_as(q))
    assert torch.equal(same[0], same[1])
    other = torch.vmap(draw, randomness="different")(q[:1].expand_as(q))
    assert not torch.equal(other[0], other[1])


def test_a_seed_drops_of_packed_sequences_what_it_drops_of_a_batch(any_backend: str) -> None:
    """Places are counted in each sequence; the second derivatives go by the same ones."""
    device = device_for(any_backend)
    batch = [torch.randn(3, 2, 21, 8, device=device, requires_grad=True) for _ in range(3)]
    offsets = torch.arange(0, 64, 21, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 7, "causal": True, "backend": any_backend}
    wanted = fusedattn.attention(*batch, **options)
    rows = [x.transpose(1, 2).reshape(63, 2, 8) for x in batch]
    found = fusedattn.attention_varlen(
        *rows, cu_seqlens_q=offsets, cu_seqlens_k=offsets, **options
    ).reshape(3, 21, 2, 8)
    torch.testing.assert_close(found.transpose(1, 2), wanted)
    grads = [
        torch.autograd.grad(x.square().sum(), batch, create_graph=True) for x in (found, wanted)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(x[0].square().sum(), batch) for x in grads), rtol=1e-4, atol=1e-4
    )
