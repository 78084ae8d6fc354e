"""Leading dimensions as `F.scaled_dot_product_attention` takes them: none, several, of size 1."""

from __future__ import annotations

import re
from typing import Any

import fusedattn
import pytest
import torch
from cases import Source
from fusedattn.ops import attention_shapes
from torch import Tensor

# Of q, k and v up to the heads, and of mask or bias.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "no batch": ((), (), (), (3, 5, 7)),
    "two dimensions": ((2, 4), (2, 4), (2, 4), (5, 7)),
    "bias of the outer one": ((2, 4), (2, 4), (2, 4), (2, 1, 3, 5, 7)),
    "bias of the inner one": ((2, 4), (2, 4), (2, 4), (4, 3, 1, 7)),
    "bias of both": ((2, 4), (2, 4), (2, 4), (2, 4, 1, 1, 7)),
    "one set of queries": ((1,), (6,), (6,), (6, 3, 5, 7)),
    "keys for all": ((6,), (1,), (6,), (1, 3, 5, 7)),
    "keys and values without a batch": ((6,), (), (), (5, 7)),
    "three, broadcast by turns": ((2, 4, 2), (2, 1, 2), (1, 4, 2), (4, 1, 3, 5, 7)),
    "sizes of one": ((1, 4), (1, 4), (1, 4), (1, 1, 3, 5, 7)),
}


def expanded(x: Tensor, leading: tuple[int, ...], rest: int) -> Tensor:
    """With one batch dimension, in memory of its own."""
    x = x[(None,) * (len(leading) + rest - x.dim())]
    return x.expand(*leading, *x.shape[len(leading) :]).flatten(0, len(leading) - 1).contiguous()


@pytest.mark.parametrize("name", SHAPES)
def test_leading_dimensions(name: str) -> None:
    of_q, of_k, of_v, of_bias = SHAPES[name]
    source = Source("cpu")
    sizes = ((*of_q, 3, 5, 8), (*of_k, 3, 7, 8), (*of_v, 3, 7, 4), of_bias)
    leaves = [source.normal(*size, dtype=torch.float64).requires_grad_() for size in sizes]
    found = fusedattn.attention(*leaves[:3], bias=leaves[3], return_lse=True)

    leading = torch.broadcast_shapes(of_q, of_k, of_v) or (1,)
    q, k, v, bias = (expanded(x, leading, 3) for x in leaves)
    wanted = fusedattn.attention(q, k, v, bias=bias, return_lse=True)
    lead = torch.broadcast_shapes(of_q, of_k, of_v)
    for x, y, rest in zip(found, wanted, (3, 2), strict=True):
        torch.testing.assert_close(x, y.reshape(*lead, *y.shape[-rest:]), rtol=0, atol=1e-13)
    grads = (torch.autograd.grad(x[0].sin().sum() + x[1].sum(), leaves) for x in (found, wanted))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_transposed_leading_dimensions_masks_and_heads() -> None:
    q, k, v = (torch.randn(4, 2, 6, 5, 8).transpose(0, 1) for _ in range(3))
    k, v = k[..., :2, :, :], v[..., :2, :, :]
    options: dict[str, Any] = {
        "mask": torch.rand(4, 1, 5, 5) < 0.8, "kv_lengths": torch.randint(0, 6, (2, 4)),
        "alibi_slopes": torch.rand(2, 4, 6), "sinks": torch.randn(6), "causal": True,
    }  # fmt: skip
    found = fusedattn.attention(q, k, v, **options)
    for a in range(2):
        for b in range(4):
            of_one = {"mask": options["mask"][b], "kv_lengths": options["kv_lengths"][a, b, None],
                      "alibi_slopes": options["alibi_slopes"][a, b]}  # fmt: skip
            one = (x[a, b, None] for x in (q, k, v))
            assert torch.equal(
                found[a, b, None], fusedattn.attention(*one, **{**options, **of_one})
            )


def test_one_call_where_nothing_is_shared_by_some_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protein model's attention along one side of a pair representation, and its pair bias."""
    calls = []
    original = attention_shapes.over_leading

    def counted(call: Any, given: Any) -> Any:
        return original(lambda **x: calls.append(x["bias"].shape) or call(**x), given)

    monkeypatch.setattr(fusedattn.ops.attention, "over_leading", counted)
    x = torch.randn(1, 9, 4, 9, 8)
    fusedattn.attention(x, x, x, bias=torch.randn(1, 1, 4, 9, 9))
    assert calls == [(1, 4, 9, 9)]
    fusedattn.attention(x.expand(2, 9, 4, 9, 8), x, x, bias=torch.randn(2, 1, 4, 9, 9))
    assert calls[1:] == [(1, 4, 9, 9)] * 2


def test_no_element() -> None:
    x = torch.randn(0, 2, 3, 5, 8, dtype=torch.float64)
    out, lse = fusedattn.attention(
        x, x, x, bias=torch.randn(0, 1, 3, 5, 5).double(), return_lse=True
    )
    assert out.shape == x.shape
    assert (lse.shape, lse.dtype) == (x.shape[:-1], x.dtype)


X = torch.randn(2, 3, 4, 5, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": X[:, :2]}, "got leading dimensions (2, 3), (2, 2), (2, 3) of q, k, v"),
        ({"k": X[0, 0, 0]}, "got k of shape (5, 8), expected 3 dimensions or more"),
        ({"kv_lengths": torch.tensor([1, 2])}, "got kv_lengths of shape (2,), expected leading"),
        ({"alibi_slopes": torch.rand(3, 4)}, "got alibi_slopes of shape (3, 4), expected leading"),
        ({"bias": torch.randn(3, 3, 4, 5, 5)}, "expected leading dimensions (2, 3), each of that"),
        ({"mask": torch.ones(1, 2, 3, 4, 5, 5) > 0}, "got mask of shape (1, 2, 3, 4, 5, 5)"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fusedattn.attention(**{"q": X, "k": X, "v": X, **changed})


def test_under_compile_and_vmap() -> None:
    bias = torch.randn(2, 1, 4, 5, 5)

    def call(x: Tensor) -> Tensor:
        return fusedattn.attention(x, x, x, bias=bias).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), call(X))
    alone = torch.vmap(lambda x: fusedattn.attention(x, x, x))(X[0])
    torch.testing.assert_close(alone, fusedattn.attention(X[0], X[0], X[0]))
