"""`fusedattn.nn.MultiheadAttention` inside torch's layers, compiled, autocast, and misused."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import fusedattn
import fusedattn.nn.attention as module_file
import pytest
import torch
from fusedattn.nn import MultiheadAttention
from torch import Tensor, nn

E, H, N, L = 32, 4, 3, 7
PADDING = torch.arange(L) >= torch.tensor([[L], [4], [2]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The q, k and v of every call of the fused op, packed or not."""
    seen: list[tuple[Tensor, ...]] = []

    def spy(op: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, v))
        return op(q, k, v, **options)

    for name in ("attention", "attention_varlen"):
        op = getattr(module_file, name)
        monkeypatch.setattr(module_file, name, functools.partial(spy, op))
    return seen


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_projects_once_and_copies_nothing(
    calls: list[tuple[Tensor, ...]], batch_first: bool
) -> None:
    x = torch.randn(N, L, E)
    MultiheadAttention(E, H, batch_first=batch_first)(x, x, x)
    assert len({t.untyped_storage().data_ptr() for t in calls[0]}) == 1


def swap(model: nn.TransformerEncoder) -> None:
    """Both ways of putting the fused module into a model of two layers."""
    built, taken_over = model.layers
    fused = MultiheadAttention(E, H, batch_first=True)
    fused.load_state_dict(built.self_attn.state_dict())
    built.self_attn = fused.train(built.training)
    taken_over.self_attn = MultiheadAttention.from_torch(taken_over.self_attn)


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_key_padding_mask": PADDING},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": True},
    ],
    ids=["no-mask", "padding", "causal", "causal-padding"],
)
def test_encoder_calls_the_fused_op(calls: list[tuple[Tensor, ...]], masks: dict[str, Any]) -> None:
    """In evaluation torch's layer has a path of its own, which must not bypass the module."""
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(N, L, E)
    with torch.no_grad():
        expected = model(x, **masks)
        swap(model)
        got = model(x, **masks)
    assert len(calls) == 2
    real = ~PADDING if "src_key_padding_mask" in masks else torch.ones(N, L, dtype=torch.bool)
    torch.testing.assert_close(got[real], expected[real], atol=3e-6, rtol=0)


def test_encoder_built_from_a_fused_layer(calls: list[tuple[Tensor, ...]]) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    for nest in (False, True):
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nest).eval()
        calls.clear()
        with torch.no_grad():
            out = model(x, src_key_padding_mask=PADDING)
        assert len(calls) == 3
        assert (out[PADDING] == 0).all() == nest  # what torch does by nested tensors


@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 6}], ids=["one", "three"])
def test_says_what_its_weights_are(sizes: dict[str, int]) -> None:
    """PEFT, quantizers and others read it; torch's fast path has to be kept out by other means."""
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **sizes)
    made = MultiheadAttention(E, H, batch_first=True, **sizes)
    for ours in (made, MultiheadAttention.from_torch(theirs)):
        assert ours._qkv_same_embed_dim is theirs._qkv_same_embed_dim is not bool(sizes)
        ours._reset_parameters()
        for twin in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert twin._qkv_same_embed_dim is not bool(sizes)
            assert len(twin._forward_pre_hooks) == 1
    assert not theirs._forward_pre_hooks


def test_strict_forbids_dropout_of_built_weights() -> None:
    module, x = MultiheadAttention(E, H, 0.1), torch.randn(L, N, E)
    with fusedattn.strict():
        module.eval()(x, x, x)
        with pytest.raises(fusedattn.UnsupportedError, match=r"dropout=0.1 while training .* stri"):
            module.train()(x, x, x)
        module(x, x, x, need_weights=False)
    module(x, x, x)


def test_decoder_layer(calls: list[tuple[Tensor, ...]]) -> None:
    layer = nn.TransformerDecoderLayer(E, H, 2 * E, dropout=0.0)
    x, memory = torch.randn(L, N, E), torch.randn(9, N, E)
    expected = layer(x, memory, CAUSAL, tgt_is_causal=True)
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    layer.multihead_attn = MultiheadAttention.from_torch(layer.multihead_attn)
    got = layer(x, memory, CAUSAL, tgt_is_causal=True)
    assert len(calls) == 2
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)


CALLS = ["self", "memory-masked", "per-head", "unbatched", "dropout", "dropout of built weights"]


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_a_break(call: str) -> None:
    dropout = 0.5 if call.startswith("dropout") else 0.0
    module = MultiheadAttention(E, H, dropout, batch_first=True)
    x = torch.randn(N, L, E, requires_grad=True)
    memory = torch.randn(N, 5, E)
    run: Callable[[], Tensor] = {
        "self": lambda: module(x, x, x, need_weights=False)[0],
        "memory-masked": lambda: module(x, memory, memory, PADDING[:, :5])[0],
        "per-head": lambda: module(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)[1],
        "unbatched": lambda: module(x[0], x[0], x[0])[0],
        "dropout": lambda: module(x, x, x, need_weights=False)[0],
        "dropout of built weights": lambda: module(x, x, x)[0],
    }[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        got = compiled()
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
    torch.manual_seed(1)
    expected = run()
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.filterwarnings("ignore")
def test_compiles_under_a_default_device() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x, memory, mask = torch.randn(N, L, E), torch.randn(N, 5, E), torch.randn(N * H, L, 5)
    for call in ((x, x, x), (x, memory, memory), (x, memory, memory + 1)):
        attn_mask = None if call[1] is x else mask
        run = functools.partial(module, *call, need_weights=False, attn_mask=attn_mask)
        with torch.device("cpu"):
            got, _ = torch.compile(run, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(got, run()[0])


@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_autocast(calls: list[tuple[Tensor, ...]], add_bias_kv: bool) -> None:
    module = MultiheadAttention(E, H, add_bias_kv=add_bias_kv)
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=add_bias_kv)
    theirs.load_state_dict(module.state_dict())
    x, mask = torch.randn(L, N, E), torch.randn(L, L)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x, attn_mask=mask)
        expected, expected_weights = theirs(x, x, x, attn_mask=mask)
    assert {t.dtype for t in calls[0]} == {torch.bfloat16}
    assert (out.dtype, weights.dtype) == (expected.dtype, expected_weights.dtype)
    exact, _ = theirs(x, x, x, attn_mask=mask)
    assert (out - exact).abs().max() <= 2 * (expected - exact).abs().max()
    out.float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize(
    ("length", "length_k", "batch"), [(0, 3, 2), (3, 0, 2), (3, 3, 0), (0, 0, 0)]
)
def test_empty(length: int, length_k: int, batch: int) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    q, k = torch.randn(batch, length, E), torch.randn(batch, length_k, E)
    out, weights = module(q, k, k)
    assert out.shape == (batch, length, E)
    assert weights.shape == (batch, length, length_k)
    if length_k == 0:
        assert torch.equal(out, module.out_proj.bias.expand_as(out))
    out.sum().backward()


X, Y = torch.zeros(L, N, E), torch.zeros(9, N, E)
BAD_CALLS = {
    "rank": (ValueError, "query of shape", ((X[None],) * 3, {})),
    "mixed-rank": (ValueError, "key of shape", ((X, X[0], X), {})),
    "not-a-tensor": (TypeError, "value of type list", ((X, X, [1.0]), {})),
    "width": (ValueError, "key of shape .* expected 32 features", ((X, X[..., :5], X), {})),
    "value-length": (ValueError, "value of shape", ((X, X, Y), {})),
    "batch": (ValueError, "key of shape .* batch size of query, 3", ((X, X[:, :1], X[:, :1]), {})),
    "padding-shape": (
        ValueError, r"key_padding_mask of shape \(3, 9\), expected \(3, 7\)",
        ((X, X, X), {"key_padding_mask": torch.zeros(3, 9)}),
    ),
    "padding-dtype": (
        TypeError, "key_padding_mask of type torch.int64",
        ((X, X, X), {"key_padding_mask": torch.zeros(3, 7, dtype=torch.int64)}),
    ),
    "mask-longer-than-keys": (
        ValueError, r"attn_mask of shape \(7, 9\), expected \(7, 7\) or \(12, 7, 7\)",
        ((X, X, X), {"attn_mask": torch.zeros(7, 9)}),
    ),
    "mask-without-heads": (
        ValueError, "attn_mask of shape", ((X, X, X), {"attn_mask": torch.zeros(3, 7, 7)}),
    ),
    "mask-no-tensor": (TypeError, "attn_mask of type bool", ((X, X, X), {"attn_mask": True})),
    "hint-alone": (ValueError, "is_causal=True without", ((X, X, X), {"is_causal": True})),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    error, message, (inputs, options) = BAD_CALLS[name]
    with pytest.raises(error, match=f"MultiheadAttention: got .*{message}"):
        MultiheadAttention(E, H)(*inputs, **options)


@pytest.mark.parametrize("build", [(0, 1), (8, 0), (8, 3), (8, 2, -0.1), (8, 2, 1.5)])
def test_bad_construction(build: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"got (embed_dim|num_heads|dropout)="):
        MultiheadAttention(*build)
