"""attention under torch.compile and torch.export: one graph, few graphs, the same numbers."""

from __future__ import annotations

from functools import partial

import fusedattn
import pytest
import torch
from fusedattn import _native
from fusedattn.ops import _registry
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import EagerAndRecordGraphs


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class GraphCounter:
    """aot_eager that counts the graphs that run: dynamo may make one and restart without it."""

    def __init__(self) -> None:
        self.made, self.ran = 0, set()

    def __call__(self, graph, inputs):
        self.made += 1
        number, compiled = self.made, aot_eager(graph, inputs)

        def run(*args):
            self.ran.add(number)
            return compiled(*args)

        return run


def tensors(seq: int, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = ((batch, 4, seq, 16), (batch, 2, seq, 16), (batch, 2, seq, 8))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def values(function, leaves, *others) -> list[torch.Tensor]:
    """The outputs and the gradients of all leaves."""
    outputs = function(*leaves, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(x[x.isfinite()].square().sum() for x in outputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, leaves))


def assert_same(found, want) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def plain(fast_backend):
    def attend(q, k, v):
        return fusedattn.attention(q, k, v, causal=True, backend=fast_backend)

    return attend


@pytest.fixture
def with_options(fast_backend):
    def attend(q, k, v, bias, mask, lengths):
        options = {"mask": mask, "kv_lengths": lengths, "return_lse": True}
        return fusedattn.attention(
            2 * q, k, v.sin(), bias=bias, causal=True, backend=fast_backend, **options
        )

    return attend


def options(seq: int) -> list[torch.Tensor]:
    """mask and kv_lengths; one query sees nothing (pytorch#100318)."""
    mask = torch.rand(seq, seq) < 0.7
    mask[seq // 2] = False
    return [mask, torch.tensor([seq, max(1, seq // 2)], dtype=torch.int32)]


@pytest.mark.slow
def test_inductor(with_options):
    leaves = [*tensors(24), torch.randn(4, 1, 24, requires_grad=True)]
    others = options(24)
    compiled = torch.compile(with_options, fullgraph=True, dynamic=True)
    assert_same(values(compiled, leaves, *others), values(with_options, leaves, *others))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_graph_forward_and_backward(dtype, dynamic, plain, recwarn):
    counter = GraphCounter()
    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=dynamic)
    leaves = tensors(24, dtype=dtype)
    assert_same(values(compiled, leaves), values(plain, leaves))
    assert len(counter.ran) == 1
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]


@pytest.mark.parametrize("dynamic", [None, True])
def test_at_most_two_graphs_over_many_lengths(dynamic, plain):
    """flash-attention#911: torch specialises on a size of 1; every other length shares a graph."""
    counter = GraphCounter()
    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=dynamic)
    for seq in (*range(40, 1, -3), 64, 128, 96, 7, *([1] if dynamic else [])):
        leaves = tensors(seq)
        assert_same(values(compiled, leaves), values(plain, leaves))
    assert len(counter.ran) <= 2


def test_at_most_two_graphs_over_many_lengths_with_options(with_options):
    counter = GraphCounter()
    compiled = torch.compile(with_options, backend=counter, fullgraph=True, dynamic=True)
    for seq in (40, 33, 16, 5, 128, 1):
        leaves = [*tensors(seq), torch.randn(4, 1, seq, requires_grad=True)]
        others = options(seq)
        assert_same(values(compiled, leaves, *others), values(with_options, leaves, *others))
    assert len(counter.ran) <= 2


@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_tensor_as_query_key_and_value(requires_grad, fast_backend):
    def attend_to_itself(x):
        return fusedattn.attention(x, x, x, causal=True, backend=fast_backend)

    x = torch.randn(2, 2, 12, 8, requires_grad=requires_grad)
    compiled = torch.compile(attend_to_itself, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attend_to_itself(x))
    if requires_grad:
        assert_same(values(compiled, [x]), values(attend_to_itself, [x]))


def test_graph_holds_the_op_and_not_its_parts(plain):
    recorder = EagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(plain, backend=recorder, fullgraph=True)(*tensors(12))
    (graph,) = recorder.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("attention_fwd" in name for name in called)
    assert not any("matmul" in name or "softmax" in name for name in called)


def test_compiled_under_autocast(plain):
    leaves = tensors(20)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, want = compiled(*leaves), plain(*leaves)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, want)


def test_bad_input_raises_under_compile(plain):
    compiled = torch.compile(plain, backend="aot_eager")
    q, k, v = tensors(12)
    with pytest.raises(Exception, match="expected one head dim"):
        compiled(q[..., :3], k, v)


def test_compiled_gradient_of_transform(plain):
    """torch.func.grad inside a compiled function."""

    def function(q, k, v):
        return torch.func.grad(lambda q: plain(q, k, v).square().sum())(q)

    q, k, v = (x.detach() for x in tensors(6))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))


def test_fallback_is_no_graph_break(monkeypatch):
    """Without the native module the reference serves the call, warning or not, in one graph."""
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_registry, "_warned", set())
    leaves = tensors(12)
    compiled = torch.compile(fusedattn.attention, backend="aot_eager", fullgraph=True)
    want = values(partial(fusedattn.attention, backend="reference"), leaves)
    assert_same(values(compiled, leaves), want)


class Block(torch.nn.Module):
    """Serves the call with the backend that a CPU tensor gets."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, mask):
        out, lse = fusedattn.attention(
            q, k, v, mask=mask, causal=True, return_lse=True, backend=self.backend
        )
        return out * 2, lse


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict, tmp_path, fast_backend):
    """pytorch#146066: exported, saved, loaded, and run at other sizes."""
    batch, seq = torch.export.Dim("batch", min=2), torch.export.Dim("seq", min=2)
    sizes = {0: batch, 2: seq}
    q, k, v = (x.detach() for x in tensors(9, batch=3))
    mask = torch.rand(3, 1, 9, 9) < 0.8
    program = torch.export.export(
        Block(fast_backend),
        (q, k, v, mask),
        dynamic_shapes=(sizes, sizes, sizes, {0: batch, 2: seq, 3: seq}),
        strict=strict,
    )
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for b, s in ((3, 9), (2, 33), (5, 4)):
        x = [*(y.detach() for y in tensors(s, batch=b)), torch.rand(b, 1, s, s) < 0.8]
        assert all(map(torch.equal, loaded(*x), Block(fast_backend)(*x)))
