"""Nested tensors in our modules: taken and refused as torch's take and refuse them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import fusedattn
import pytest
import torch
from torch import Tensor, nn

E, H, N, L = 8, 2, 3, 5
LENGTHS = (3, 5, 0)
PADDING = torch.arange(L) >= torch.tensor([[4], [L], [2]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
LAYOUTS = [torch.strided, torch.jagged]

# torch says once per process that the strided layout is a prototype.
pytestmark = [
    pytest.mark.usefixtures("fp64_on_one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def nested(layout: torch.layout, *shapes: tuple[int, ...], leaf: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=draw) for shape in shapes]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=leaf)


def sequences(layout: torch.layout, *, leaf: bool = False) -> Tensor:
    return nested(layout, *((n, E) for n in LENGTHS), leaf=leaf)


def same(got: Tensor, expected: Tensor, layout: torch.layout) -> None:
    assert got.is_nested
    assert got.layout is layout
    for a, b in zip(got.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def gradients(module: nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    """Of x, sequence after sequence, and of the parameters."""
    packed = torch.cat([part.flatten() for part in out.unbind()])
    (packed * torch.linspace(-1, 2, len(packed))).sum().backward()
    parts = [part.detach().flatten() for part in x.grad.unbind()]
    return [torch.cat(parts), *(p.grad for p in module.parameters())]


ROWWISE: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    "layer": (nn.LayerNorm(E), ((3, E), (5, E), (0, E))),
    "layer-one-sequence": (nn.LayerNorm(E), ((3, E),)),
    "layer-two-dims": (nn.LayerNorm((2, E)), ((3, 2, E), (5, 2, E))),
    "layer-of-four": (nn.LayerNorm(E), ((3, 2, E), (5, 2, E))),
    "rms": (nn.RMSNorm(E), ((3, E), (5, E))),
    "softmax-last": (nn.Softmax(-1), ((3, E), (5, E))),
    "softmax-ragged": (nn.Softmax(1), ((3, E), (5, E))),
    "softmax-between": (nn.Softmax(2), ((3, 2, E), (5, 2, E))),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_rows_as_torch(name: str, layout: torch.layout) -> None:
    theirs, shapes = copy.deepcopy(ROWWISE[name])
    theirs.double()
    ours = copy.deepcopy(theirs)
    fusedattn.replace(ours)
    dim = getattr(theirs, "dim", 0)
    found, expected = (nested(layout, *shapes, leaf=True) for _ in range(2))
    got = ours(found)
    # What torch lacks: the strided RMS norm, and a gradient of some jagged softmaxes.
    lacking = {("rms", torch.strided), ("softmax-between", torch.jagged)}
    if (name, layout) in lacking:
        rows = [theirs(part) if dim == 0 else part.softmax(dim - 1) for part in expected.unbind()]
        want = torch.nested.as_nested_tensor(rows, layout=layout)
    else:
        want = theirs(expected)
    same(got, want, layout)
    for a, b in zip(gradients(ours, found, got), gradients(theirs, expected, want), strict=True):
        torch.testing.assert_close(a, b)


def test_jagged_along_another_dimension() -> None:
    """(N, H, j, E), as heads are split, and a view of other rows that has holes."""
    x = nested(torch.jagged, (3, H, E), (5, H, E)).transpose(1, 2)
    y = torch.nested.narrow(
        torch.randn(N, 6, E), 1, torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4]), torch.jagged
    )
    modules = (nn.LayerNorm(E), nn.RMSNorm(E), nn.Softmax(-1))
    for theirs, given in itertools.product(modules, (x, y)):
        ours = copy.deepcopy(theirs)
        fusedattn.replace(ours)
        got = ours(given)
        assert got.shape == given.shape
        same(got, theirs(given), torch.jagged)


def test_what_only_torch_takes() -> None:
    """A norm over the batch too; rows that are not contiguous."""
    x = nested(torch.strided, (5, E), (5, E))
    for theirs, given in ((nn.LayerNorm((2, 5, E)), x), (nn.Softmax(-1), x.transpose(1, 2))):
        ours = copy.deepcopy(theirs)
        fusedattn.replace(ours)
        same(ours(given), theirs(given), torch.strided)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_residual(layout: torch.layout) -> None:
    x, residual = sequences(layout), sequences(layout)
    if layout is torch.jagged:
        residual = x * 2
    norm = fusedattn.nn.LayerNorm(E)
    out, z = norm(x, residual)
    same(z, x + residual, layout)
    same(out, norm(z), layout)
    others = nested(layout, *((n + 1, E) for n in LENGTHS))
    for wrong in (torch.randn(8, E), others, sequences(LAYOUTS[layout is torch.strided])):
        with pytest.raises(ValueError, match=r"LayerNorm: got a nested tensor with a residual"):
            norm(x, wrong)


REFUSED: dict[str, Callable[[torch.layout], tuple[nn.Module, Tensor]]] = {
    "norm-of-another-width": lambda layout: (nn.LayerNorm(7), sequences(layout)),
    "norm-over-the-ragged": lambda layout: (nn.LayerNorm((5, E)), sequences(layout)),
    "norm-of-ragged-rows": lambda layout: (nn.LayerNorm(3), nested(layout, (E, 3), (E, 5))),
    "softmax-over-the-batch": lambda layout: (nn.Softmax(0), sequences(layout)),
    "softmax-of-no-dim": lambda layout: (nn.Softmax(3), sequences(layout)),
    "softmax-of-no-dim-below": lambda layout: (nn.Softmax(-4), sequences(layout)),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_torch(name: str, layout: torch.layout) -> None:
    module, x = REFUSED[name](layout)
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        module(x)
    fusedattn.replace(module)
    with pytest.raises(theirs.type) as ours:
        module(x)
    assert str(ours.value) == str(theirs.value)


def test_softmax_options_on_nested() -> None:
    x = sequences(torch.jagged)
    same(fusedattn.nn.Softmax(-1, scale=3.0)(x), (3 * x).softmax(-1), torch.jagged)
    same(fusedattn.nn.Softmax(1, scale=3.0)(x), (3 * x).softmax(1), torch.jagged)
    with pytest.raises(ValueError, match="Softmax: got a nested input with a mask, a bias or"):
        fusedattn.nn.Softmax(-1, causal=True)(x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_attention(layout: torch.layout, options: dict[str, Any]) -> None:
    """With gradients, and while training, where torch's refuses."""
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = fusedattn.nn.MultiheadAttention.from_torch(copy.deepcopy(theirs))
    x, expected = (sequences(layout, leaf=True) for _ in range(2))
    out, weights = ours(x, x, x, average_attn_weights=False)
    same(ours(x, x, x, need_weights=False)[0], out, layout)
    rows = [theirs(part, part, part)[0] if len(part) else part for part in expected.unbind()]
    want = torch.nested.as_nested_tensor(rows, layout=layout)
    same(out, want, layout)
    assert weights.shape == (N, H, max(LENGTHS), max(LENGTHS) + ("add_bias_kv" in options))
    assert weights.sum(-1).count_nonzero() == H * sum(LENGTHS)
    for a, b in zip(gradients(ours, x, out), gradients(theirs, expected, want), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_attention_drops_what_it_drops_of_a_padded_batch(layout: torch.layout) -> None:
    ours = fusedattn.nn.MultiheadAttention(E, H, dropout=0.4, batch_first=True)
    x = sequences(layout)
    padded = x.to_padded_tensor(0.0)
    blocked = torch.arange(L) >= torch.tensor(LENGTHS)[:, None]
    torch.manual_seed(3)
    found, _ = ours(x, x, x, need_weights=False)
    torch.manual_seed(3)
    want, _ = ours(padded, padded, padded, blocked, need_weights=False)
    for part, row, length in zip(found.unbind(), want, LENGTHS, strict=True):
        torch.testing.assert_close(part, row[:length])


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_where_torch_takes_it(need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours, x = fusedattn.nn.MultiheadAttention.from_torch(theirs), sequences(torch.strided)
    with torch.no_grad():
        (got, weights), (want, expected) = (
            module(x, x, x, need_weights=need_weights) for module in (ours, theirs)
        )
    same(got, want, torch.strided)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_attention_refuses_what_is_not_plain(layout: torch.layout) -> None:
    x, dense = sequences(layout), torch.randn(N, L, E)
    ours = fusedattn.nn.MultiheadAttention(E, H, batch_first=True)
    length_first = fusedattn.nn.MultiheadAttention(E, H)
    calls: list[Callable[[], Any]] = [
        lambda: length_first(x, x, x),
        lambda: ours(x, dense, dense),
        lambda: ours(dense, x, x),
        lambda: ours(x, x, x + 0),
        lambda: ours(x, x, x, PADDING),
        lambda: ours(x, x, x, attn_mask=CAUSAL),
        lambda: ours(x, x, x, is_causal=True),
        lambda: ours(*[nested(layout, (3, H, E), (5, H, E))] * 3),
    ]
    message = r"MultiheadAttention: got (query|key) that is nested, expected with a nested tensor b"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
