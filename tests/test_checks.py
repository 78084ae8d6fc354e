"""What the checks of every op take for granted, and memory that an in-place op may not share."""

from __future__ import annotations

import itertools
import random
from decimal import Decimal

import fusedattn
import numpy as np
import pytest
import torch
from fusedattn.ops import _checks
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

DTYPES = (torch.uint8, torch.float16, torch.float32, torch.float64)


# --- options -------------------------------------------------------------------------------------

X = torch.randn(1, 1, 4, 4)
# Equal to 1 or to 0, but nothing that the option may be.
EQUAL = [
    ("attention", (X, X, X), "scale", 1.0, [True, 1 + 0j, Decimal(1)]),
    ("attention", (X, X, X), "dropout_p", 0.0, [False, 0j, Decimal(0)]),
    ("attention", (X, X, X), "causal", True, [1, 1.0, np.int64(1)]),
    ("attention", (X, X, X), "deterministic", True, [1, 1.0]),
    ("softmax", (X,), "scale", 1.0, [True, 1 + 0j]),
    ("softmax", (X,), "causal", False, [0, 0.0, -0.0]),
    ("softmax", (X,), "dim", 1, [True, 1.0]),
    ("layer_norm", (X, 4), "eps", 1.0, [True, 1 + 0j]),
    ("rms_norm", (X, 4), "weight_offset", 1.0, [True, 1 + 0j]),
    ("rms_norm", (X, 4), "dropout_p", 0.0, [False, 0j]),
]


@pytest.mark.parametrize(("function", "arguments", "option", "usual", "others"), EQUAL)
def test_option_is_looked_at_alone(function, arguments, option, usual, others):
    """What equals an option of an earlier call is not taken for it."""
    call = getattr(fusedattn, function)
    call(*arguments, **{option: usual})
    for other in others:
        with pytest.raises(TypeError, match=f"{function}: got {option} of type"):
            call(*arguments, **{option: other})


def test_option_of_a_tensor_that_changes():
    scale = torch.tensor(0.5)
    for value in (0.5, 2.0):
        scale.fill_(value)
        want = fusedattn.attention(X, X, X, scale=value)
        assert torch.equal(fusedattn.attention(X, X, X, scale=scale), want)
        assert torch.equal(fusedattn.softmax(X, scale=scale), fusedattn.softmax(X, scale=value))
        want = fusedattn.layer_norm(X, 4, eps=value)
        assert torch.equal(fusedattn.layer_norm(X, 4, eps=scale), want)


def test_option_that_is_symbolic():
    """What a model computes from a shape, while it is traced."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        seq, width = x.shape[-2:]
        return (
            fusedattn.attention(x, x, x, scale=width**-0.25),
            fusedattn.softmax(x, scale=width),
            fusedattn.layer_norm(x, width, eps=1.0 / seq),
            fusedattn.add_sinusoidal(x, scale=width**0.5, base=seq, offset=seq),
        )

    for found, want in zip(make_fx(model, tracing_mode="symbolic")(X)(X), model(X), strict=True):
        assert torch.equal(found, want)


# --- tensors without values ----------------------------------------------------------------------

LENGTHS = [
    (4, 8),
    (5, 5),
    pytest.param(8, 4, marks=pytest.mark.filterwarnings("ignore:Lower right")),
]


@pytest.mark.parametrize(("seq_q", "seq_k"), LENGTHS)
@pytest.mark.parametrize(
    ("make", "causal"), [(causal_lower_right, "bottom_right"), (causal_upper_left, "top_left")]
)
def test_causal_bias_of_torch(make, causal, seq_q, seq_k):
    """Its memory is never written: what it stands for is `causal`."""
    q, k = torch.randn(2, 4, seq_q, 8), torch.randn(2, 2, seq_k, 8)
    rule, other = make(seq_q, seq_k), torch.rand(seq_q, seq_k)
    want = fusedattn.attention(q, k, k, causal=causal, bias=other)
    assert torch.equal(fusedattn.attention(q, k, k, mask=rule, bias=other), want)
    want = fusedattn.attention(q, k, k, causal=causal, mask=other < 0.8)
    assert torch.equal(fusedattn.attention(q, k, k, mask=other < 0.8, bias=rule), want)
    given = fusedattn.attention, q, k, k
    assert fusedattn.explain(*given, bias=rule) == fusedattn.explain(*given, causal=causal)


def test_causal_bias_of_torch_compiled():
    q, k, rule = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8), causal_lower_right(4, 6)
    compiled = torch.compile(fusedattn.attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, k, bias=rule), fusedattn.attention(q, k, k, causal=True))
    torch._dynamo.reset()


def test_causal_bias_that_does_not_fit():
    q, rule = torch.randn(1, 1, 4, 8), causal_lower_right(4, 4)
    for options, message in (
        ({"bias": causal_lower_right(4, 5)}, r"bias, a CausalBias for lengths \(4, 5\).*\(4, 4\)"),
        ({"bias": rule, "causal": True}, "causal=True and bias, a CausalBias, expected one of the"),
        ({"bias": rule, "mask": rule}, "causal='bottom_right' and bias, a CausalBias"),
    ):
        with pytest.raises(ValueError, match=f"attention: got {message}"):
            fusedattn.attention(q, q, q, **options)
    with pytest.raises(TypeError, match="softmax: got bias of type CausalBias, expected a dense"):
        fusedattn.softmax(q, bias=causal_lower_right(4, 8))


# --- memory that is written in place -------------------------------------------------------------


def bytes_of(x: Tensor) -> list[range]:
    """Where each element of x lies in its storage."""
    size = x.element_size()
    steps = [
        range(0, n * step, step) if step else [0] * n
        for n, step in zip(x.shape, x.stride(), strict=True)
    ]
    starts = (size * (x.storage_offset() + sum(place)) for place in itertools.product(*steps))
    return [range(start, start + size) for start in starts]


def any_view(memory: Tensor, dice: random.Random) -> Tensor:
    while True:
        rank = dice.randint(0, 4)
        shape = [dice.randint(dice.random() > 0.05, 4) for _ in range(rank)]
        strides, offset = [dice.randint(0, 9) for _ in range(rank)], dice.randint(0, 20)
        flat = memory.view(dice.choice(DTYPES))
        if offset + sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True)) < len(
            flat
        ):
            return flat.as_strided(shape, strides, offset)


def test_overlap_is_exact():
    dice, memory, found = random.Random(0), torch.zeros(400, dtype=torch.uint8), set()
    for _ in range(1000):
        x, y = any_view(memory, dice), any_view(memory, dice)
        places, places_y = bytes_of(x), bytes_of(y)
        shared = bool(set().union(*places) & set().union(*places_y))
        assert _checks._overlap(*_checks._layout(x, y)) == shared
        repeated = len(set(places)) != len(places)
        assert _checks._overlaps_itself(x.shape, x.stride()) == repeated
        found.add((shared, repeated))
    assert len(found) == 4


def test_overlap_in_doubt():
    """Strides that have too many ways past one another count as an overlap, in no time."""
    memory = torch.empty(2**17)
    x, y = memory.as_strided((2**14,), (6,)), memory.as_strided((2**14,), (4,), 1)
    assert _checks._overlap(*_checks._layout(x, y))


def rotated(q: Tensor, k: Tensor, *tables: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    return fusedattn.apply_rotary_qk(q, k, *tables, inplace=inplace)


B, H, S, D = 2, 3, 5, 8
INTERLEAVED = {
    "fused": lambda: torch.randn(B, S, 3, H, D).transpose(1, 3).unbind(2)[:2],
    "fused, grouped": lambda: torch.randn(B, S, H + 2, D).transpose(1, 2).split([H, 1, 1], 1)[:2],
    "by head": lambda: torch.randn(B, S, H, 3, D).transpose(1, 2).unbind(3)[:2],
    "by feature": lambda: torch.randn(B, H, S, D, 2).unbind(-1),
    "side by side": lambda: torch.randn(2, B, H, S, D).unbind(0),
}
SHARED = {
    "heads": lambda x: (x[:, :2], x[:, 1:]),
    "all": lambda x: (x, x.view(x.shape)),
    "detached": lambda x: (x, x.detach()),
    "transposed": lambda x: (x[..., :5, :4], x[..., :4, :5].transpose(2, 3)[..., :5, :4]),
    "one row": lambda x: (x[..., :3, :], x[..., 2:, :]),
    "queries in windows": lambda x: (x.flatten().unfold(0, 4, 2)[None], torch.randn(1, 59, 4)),
}


@pytest.mark.parametrize("make", INTERLEAVED.values(), ids=INTERLEAVED)
def test_in_place_between_one_another(make):
    q, k = make()
    tables = torch.randn(S, D // 2), torch.randn(S, D // 2)
    want = rotated(q, k, *tables, inplace=False)
    rotated(q, k, *tables, inplace=True)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_in_place_on_shared_memory(make):
    memory = torch.randn(1, H, S, D)
    before = memory.clone()
    q, k = make(memory)
    tables = torch.randn(q.shape[-2], 2), torch.randn(q.shape[-2], 2)
    with pytest.raises(RuntimeError, match=r"apply_rotary_qk: .* single memory location.* clone"):
        rotated(q, k, *tables, inplace=True)
    assert torch.equal(memory, before)


def test_in_place_over_the_tables():
    memory = torch.randn(6, 8)
    x, cos, sin = memory[:4], memory[2:, :2], torch.randn(4, 2)
    for tables, name in (((cos, sin), "cos"), ((sin, cos), "sin")):
        with pytest.raises(RuntimeError, match=rf"apply_rotary: .*of x, .* and {name} refer"):
            fusedattn.apply_rotary(x, *tables, inplace=True)
    numbers = torch.zeros(4, 2, dtype=torch.int64)
    x = numbers.view(torch.float32)
    for option in ({"positions": numbers[:, 0]}, {"offset": numbers[3, 1]}):
        with pytest.raises(RuntimeError, match=f"and {next(iter(option))} refer"):
            fusedattn.apply_rotary(x, sin, sin, inplace=True, **option)
    fusedattn.apply_rotary(memory[:2], cos, sin, inplace=True)
