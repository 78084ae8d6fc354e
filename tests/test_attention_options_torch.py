"""Every option of attention inside torch's tools: compiled, exported, autocast, checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import fusedattn
import pytest
import torch
from fusedattn import biases, masks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HEADS, DIM = 4, 16
Leaves = tuple[Tensor, ...]


class Option(NamedTuple):
    """The options of a call on `lengths` queries and keys, from tensors that want gradients."""

    given: Callable[..., dict[str, Any]]
    leaves: Callable[[], Leaves] = tuple


def table(rows: int) -> Callable[[], Leaves]:
    return lambda: (torch.randn(rows, HEADS),)


def per_head() -> Leaves:
    return (torch.rand(HEADS) + 0.1,)


def of_lengths(q: Tensor) -> Tensor:
    """The whole of the first sequence, half of the second."""
    return (q.shape[2] // torch.arange(1, q.shape[0] + 1)).int()


def lower_triangle(n: int) -> Tensor:
    return torch.ones(n, n).tril().bool()


OPTIONS = {
    "causal, bottom right": Option(lambda q: {"causal": "bottom_right"}),
    "window": Option(lambda q: {"window": (5, 2)}),
    "softcap": Option(lambda q: {"softcap": 2.0}),
    "scale of each head": Option(lambda q, scale: {"scale": scale}, per_head),
    "slopes": Option(lambda q, slopes: {"alibi_slopes": slopes, "causal": True}, per_head),
    "sinks": Option(lambda q, sinks: {"sinks": sinks}, per_head),
    "dropout": Option(lambda q: {"dropout_p": 0.3, "seed": 7}),
    "deterministic": Option(lambda q: {"deterministic": True}),
    "lengths": Option(lambda q: {"kv_lengths": of_lengths(q)}),
    "bias of T5": Option(
        lambda q, x: {"bias": biases.t5(x, bidirectional=True, max_distance=20)}, table(8)
    ),
    "relative bias": Option(lambda q, x: {"bias": biases.relative(x)}, table(9)),
    "shared bias": Option(
        lambda q, x: {"bias": x[..., : q.shape[2]].sin()}, lambda: (torch.randn(HEADS, 1, 60),)
    ),
    "dense mask": Option(lambda q: {"mask": lower_triangle(q.shape[2])}),
    "documents": Option(
        lambda q: {"mask": masks.documents(torch.arange(q.shape[2]).expand(q.shape[0], -1) // 7)}
    ),
    "prefix": Option(lambda q: {"mask": masks.prefix(of_lengths(q)), "causal": True}),
    "blocks": Option(
        lambda q: {"mask": masks.blocks(lower_triangle((q.shape[2] + 7) // 8), 8)}
    ),
}  # fmt: skip


def qkv(seq: int) -> Leaves:
    return tuple(torch.randn(2, heads, seq, DIM) for heads in (HEADS, 2, 2))


def attend(given: Callable[..., dict[str, Any]], q: Tensor, k: Tensor, v: Tensor, *more: Tensor):
    """Inputs that depend on one another, as in a model."""
    return fusedattn.attention(q, k, v + 0.5 * k, **given(q, *more))


def results(function: Callable[..., Tensor], leaves: Leaves) -> list[Tensor]:
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=OPTIONS)
def option(request: pytest.FixtureRequest) -> Option:
    return OPTIONS[request.param]


def test_compiled_in_one_graph_at_any_length(option: Option) -> None:
    torch._dynamo.reset()
    more, graphs = option.leaves(), []
    call = partial(attend, option.given)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for seq in (33, 40, 57):  # static, then dynamic, then not again
        leaves = (*qkv(seq), *more)
        assert_same(results(compiled, leaves), results(call, leaves))
    assert len(graphs) <= 2


def test_checkpointed_and_under_autocast(option: Option) -> None:
    leaves = (*qkv(20), *option.leaves())
    call = partial(attend, option.given)
    with torch.autocast("cpu", torch.bfloat16):
        want = results(call, leaves)
        found = results(lambda *x: checkpoint(call, *x, use_reentrant=False), leaves)
    assert want[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, want))
    for a, b in zip(want, results(call, leaves), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05 * b.abs().max().item())


class Module(torch.nn.Module):
    def __init__(self, given: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return attend(self.given, q, k, v, *more)


def test_exported(option: Option) -> None:
    more = option.leaves()
    program = torch.export.export(Module(option.given), (*qkv(20), *more))
    inputs = (*qkv(20), *more)
    assert torch.equal(program.module()(*inputs), attend(option.given, *inputs))
