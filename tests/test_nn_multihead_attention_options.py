"""What MultiheadAttention takes beyond torch's: window, softcap, ALiBi, sinks, rotary."""

from __future__ import annotations

import copy
from typing import Any

import fusedattn
import pytest
import torch
from fusedattn.nn import MultiheadAttention, RotaryEmbedding
from fusedattn.reference import functional as reference
from torch import Tensor

E, H, L = 24, 3, 37
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (5, 2)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "rotary": {"rotary": RotaryEmbedding(8)},
    "all": {"window": (9, 0), "softcap": 2.0, "alibi": True, "sinks": True,
            "rotary": RotaryEmbedding(8)},
}  # fmt: skip


def make(options: dict[str, Any], **further: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options, **further)
    if options.get("sinks"):
        torch.nn.init.normal_(module.sinks)
    return module


def by_hand(module: MultiheadAttention, x: Tensor, options: dict[str, Any]) -> Tensor:
    q, k, v = (
        y.unflatten(-1, (H, E // H)).transpose(1, 2)
        for y in torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(
            3, -1
        )
    )
    if "rotary" in options:
        q, k = options["rotary"](q, k)
    given = {name: options[name] for name in ("window", "softcap") if name in options}
    if "alibi" in options:  # of three heads those of two, and the first of four
        given["alibi_slopes"] = torch.tensor([2**-4, 2**-8, 2**-2]).double().view(1, H, 1, 1)
    if "sinks" in options:
        given["sinks"] = module.sinks.view(1, H, 1, 1)
    out, _ = reference.attention(q, k, v, **given)
    return module.out_proj(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("name", OPTIONS)
def test_output_weights_and_gradients(name: str) -> None:
    module = make(OPTIONS[name])
    x = torch.randn(2, L, E, dtype=torch.float64, requires_grad=True)
    want = by_hand(module, x, OPTIONS[name])
    leaves = [x, *module.parameters()]
    for out in (module(x, x, x, need_weights=False)[0], module(x, x, x)[0]):
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        for found, grad in zip(
            torch.autograd.grad(out.sin().sum(), leaves),
            torch.autograd.grad(want.sin().sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, grad, rtol=0, atol=1e-11)
    _, weights = module(x, x, x, average_attn_weights=False)
    v = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)[2]
    out = weights @ v.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(
        module.out_proj(out.transpose(1, 2).flatten(-2)), want, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ["window", "alibi", "sinks", "rotary"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_nested_tensors(name: str, dropout: float) -> None:
    """Packed or padded, each sequence is as if alone."""
    module = make(OPTIONS[name], dropout=dropout)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (5, 11, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.manual_seed(1)
    out, _ = module(nested, nested, nested, need_weights=False)
    for found, x in zip(out.unbind(), rows, strict=True):
        if dropout == 0.0:
            want = module(x[None], x[None], x[None], need_weights=False)[0][0]
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
        assert found.isfinite().all()
    torch.manual_seed(1)
    again, _ = module(nested, nested, nested, need_weights=False)
    assert torch.equal(again.values(), out.values())


def test_state_copies_and_dtypes() -> None:
    plain, module = MultiheadAttention(E, H), make(OPTIONS["all"])
    assert module.state_dict().keys() - plain.state_dict().keys() == {"sinks"}
    assert fusedattn.nn.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    x = torch.randn(2, L, E)
    for twin in (copy.deepcopy(module), MultiheadAttention.from_torch(module)):
        want = module(x.double(), x.double(), x.double(), need_weights=False)[0]
        assert torch.equal(twin(*[x.double()] * 3, need_weights=False)[0], want)
    half = module.to(torch.bfloat16)
    assert half(*[x.bfloat16()] * 3, need_weights=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": (-1, 0)}, ValueError, r"got window=\(-1, 0\)"),
        ({"softcap": -1.0}, ValueError, "got softcap=-1.0"),
        ({"alibi": 3}, TypeError, "got alibi of type int"),
        ({"rotary": 3}, TypeError, "got rotary of type int, expected a Module"),
        ({"alibi": True, "add_zero_attn": True}, ValueError, "expected neither add_bias_kv nor"),
    ],
)
def test_what_does_not_fit(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(E, H, **options)
