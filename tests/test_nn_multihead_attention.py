"""`fusedattn.nn.MultiheadAttention` against `torch.nn.MultiheadAttention`, weight for weight."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import compare
import fusedattn
import pytest
import torch
from fusedattn.nn import MultiheadAttention
from torch import Tensor, nn

E, H, N, L, S = 24, 4, 3, 5, 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One regime: how the module is built, what it is given and what is asked of it."""

    build: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: str = "self"  # or "memory" (key is value) or "apart"
    attn_mask: str = ""  # "bool" or "float", "causal"; "… 3d" per head
    padding: str = ""  # "bool" or "float"
    batched: bool = True
    call: dict[str, Any] = dataclasses.field(default_factory=dict)


NO_WEIGHTS = {"need_weights": False}
PER_HEAD = {"average_attn_weights": False}
HINT = {"is_causal": True, "need_weights": False}
CASES = {
    "self": Case(),
    "self-batch-first": Case({"batch_first": True}),
    "self-no-weights": Case(call=NO_WEIGHTS),
    "self-no-bias": Case({"bias": False}),
    "self-unbatched": Case(batched=False),
    "self-unbatched-per-head": Case({"batch_first": True}, batched=False, call=PER_HEAD),
    "memory-per-head": Case({"batch_first": True}, "memory", call=PER_HEAD),
    "memory-no-bias": Case({"bias": False}, "memory", call=NO_WEIGHTS),
    "apart": Case(inputs="apart"),
    "apart-unbatched-masked": Case({}, "apart", "float", "float", batched=False),
    "unbatched-3d-mask": Case({}, "apart", "bool 3d", "bool", batched=False),
    "kdim-vdim": Case({"kdim": 10, "vdim": 6, "batch_first": True}, "apart"),
    "kdim-vdim-no-bias": Case({"kdim": 10, "vdim": 6, "bias": False}, "apart", "bool"),
    "bool-mask": Case({}, "apart", "bool"),
    "bool-mask-3d-and-padding": Case({"batch_first": True}, "apart", "bool 3d", "bool"),
    "float-mask": Case({}, "memory", "float", call=NO_WEIGHTS),
    "float-mask-3d-and-padding": Case({"batch_first": True}, "apart", "float 3d", "float"),
    "bool-padding": Case({"batch_first": True}, "memory", padding="bool", call=NO_WEIGHTS),
    "float-padding": Case({}, "apart", padding="float", call=NO_WEIGHTS),
    "causal-hint": Case({"batch_first": True}, attn_mask="causal", call=HINT),
    "causal-hint-cross": Case({}, "apart", "causal", call=HINT),
    "causal-hint-and-padding": Case({}, attn_mask="causal", padding="bool", call=HINT),
    "causal-hint-weights": Case({}, attn_mask="causal", call={"is_causal": True}),
    "bias-kv": Case({"add_bias_kv": True}, "apart", "bool", "bool"),
    "bias-kv-and-zero": Case(
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, "apart", "float", "float"
    ),
    "zero-attn-causal-hint": Case(
        {"add_zero_attn": True}, attn_mask="causal", padding="bool", call=HINT
    ),
}


def tensors(case: Case) -> dict[str, Tensor]:
    """The tensors of a case in fp64, by argument name."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    def stream(length: int, width: int) -> Tensor:
        if not case.batched:
            return random(length, width)
        batch_first = case.build.get("batch_first", False)
        return random(N, length, width) if batch_first else random(length, N, width)

    keys = L if case.inputs == "self" else S
    found = {"query": stream(L, E)}
    if case.inputs != "self":
        found["key"] = stream(S, case.build.get("kdim", E))
    if case.inputs == "apart":
        found["value"] = stream(S, case.build.get("vdim", E))
    if case.attn_mask:
        batch = N if case.batched else 1
        shape = (batch * H, L, keys) if "3d" in case.attn_mask else (L, keys)
        added = random(*shape)
        blocked = added > 0.8
        blocked[..., 0] = False
        if case.attn_mask == "causal":
            blocked = torch.ones(shape, dtype=torch.bool).triu(1)
        found["attn_mask"] = added if "float" in case.attn_mask else blocked
    if case.padding:
        shape = (N, keys) if case.batched else (keys,)
        ends = torch.tensor([[keys], [keys - 2], [1]]) if case.batched else torch.tensor([keys - 1])
        found["key_padding_mask"] = (
            random(*shape) if case.padding == "float" else torch.arange(keys) >= ends
        )
    return found


def run(module: nn.MultiheadAttention, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, weights, and every gradient, of inputs, float masks and parameters."""
    given = {
        name: x if x.dtype == torch.bool else x.to(dtype).requires_grad_()
        for name, x in tensors(case).items()
    }
    leaves = dict(given)
    given.setdefault("key", given["query"])
    given.setdefault("value", given["key"])
    out, weights = module(**given, **case.call)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    draw = torch.Generator().manual_seed(2)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=draw).to(dtype)).sum()
        for x in results.values()
    )
    loss.backward()
    results = {name: x.detach() for name, x in results.items()}
    results |= {f"d {n}": x.grad for n, x in leaves.items() if x.dtype != torch.bool}
    return results | {f"d {n}": x.grad for n, x in module.named_parameters()}


def twins(dtype: torch.dtype, **build: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module with random biases, and ours with its state_dict."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **build, dtype=dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, **build, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name: str) -> None:
    case = CASES[name]
    theirs, ours = twins(torch.float32, **case.build)
    exact = copy.deepcopy(theirs).double()
    got, eager, ref = (
        run(ours, case, torch.float32),
        run(theirs, case, torch.float32),
        run(exact, case, torch.float64),
    )
    assert got.keys() == eager.keys()
    for what, x in got.items():
        assert x.shape == eager[what].shape
        gradient = what.startswith("d ")
        compare.check(x, ref[what], eager[what], what=what, case=case, gradient=gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    case = CASES["bool-mask-3d-and-padding"]
    theirs, ours = twins(dtype, **case.build)
    exact = copy.deepcopy(theirs).double()
    got, eager = run(ours, case, dtype), run(theirs, case, dtype)
    ref = run(exact, case, torch.float64)
    for what in ("out", "weights"):
        assert got[what].dtype == dtype
        compare.check(got[what], ref[what], eager[what], what=what, case=case)


def test_mixed_kinds_of_mask() -> None:
    _, ours = twins(torch.float32)
    x = torch.randn(L, N, E)
    blocked = torch.ones(L, L, dtype=torch.bool).triu(1)
    as_float = torch.zeros(L, L).masked_fill(blocked, float("-inf"))
    padding = torch.randn(N, L)
    mixed = ours(x, x, x, padding, attn_mask=blocked)
    for half in (torch.bfloat16, torch.float64):
        same = ours(x, x, x, padding, attn_mask=as_float.to(half))
        torch.testing.assert_close(mixed, same, atol=1e-6, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_blocked_queries_attend_to_nothing(kind: str, need_weights: bool, dropout: float) -> None:
    """torch gives NaN here or 0, by path; a padded-out sequence must not poison the batch."""
    _, ours = twins(torch.float32, batch_first=True, dropout=dropout)
    x = torch.randn(2, L, E, requires_grad=True)
    blocked = torch.tensor([[False] * L, [True] * L])
    padding = blocked if kind == "bool" else torch.zeros(2, L).masked_fill(blocked, float("-inf"))
    out, weights = ours(x, x, x, padding, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
    out.square().sum().backward()
    assert torch.equal(x.grad[1], torch.zeros(L, E))
    assert x.grad[0].abs().min() > 0
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(L, L))


def test_dropout_acts_only_while_training() -> None:
    _, still = twins(torch.float32)
    _, ours = twins(torch.float32, dropout=0.5)
    x = torch.randn(L, N, E)
    first, dropped = ours(x, x, x, average_attn_weights=False)
    second, _ = ours(x, x, x)
    assert not torch.equal(first, second)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    _, kept = still(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2.0 * kept))
    for a, b in zip(ours.eval()(x, x, x), still(x, x, x), strict=True):
        assert torch.equal(a, b)


def test_dropout_without_weights_is_the_ops() -> None:
    _, ours = twins(torch.float32, dropout=0.5)
    x, eye = torch.randn(L, N, E), torch.eye(E)
    ours.in_proj_weight.data = eye.repeat(3, 1)
    ours.out_proj.weight.data, ours.out_proj.bias.data = eye, torch.zeros(E)
    ours.in_proj_bias.data.zero_()
    heads = x.unflatten(-1, (H, -1)).permute(1, 2, 0, 3)
    for seed in (1, 2):
        torch.manual_seed(seed)
        found, _ = ours(x, x, x, need_weights=False)
        torch.manual_seed(seed)
        want = fusedattn.attention(heads, heads, heads, dropout_p=0.5)
        torch.testing.assert_close(found, want.permute(2, 0, 1, 3).flatten(-2))


def test_dropout_matches_torch_for_the_same_draws() -> None:
    theirs, ours = twins(torch.float32, dropout=0.3)
    x = torch.randn(L, N, E)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(module(x, x, x, average_attn_weights=False)[1] == 0)
    assert torch.equal(*results)


@pytest.mark.parametrize("build", [{}, {"kdim": 10, "vdim": 6, "add_bias_kv": True}])
def test_state_is_torchs(build: dict[str, int]) -> None:
    theirs, ours = twins(torch.float32, **build)
    shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in ours.state_dict().items()} == shapes
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    theirs._reset_parameters()
    torch.manual_seed(3)
    ours._reset_parameters()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_from_torch_shares_parameters() -> None:
    theirs, _ = twins(torch.float32, batch_first=True, dropout=0.1)
    theirs.in_proj_weight.requires_grad_(False)
    ours = MultiheadAttention.from_torch(theirs.eval())
    assert type(ours) is MultiheadAttention
    assert not ours.training
    assert ours.in_proj_weight is theirs.in_proj_weight
    assert not ours.in_proj_weight.requires_grad
    x = torch.randn(N, L, E)
    exact = copy.deepcopy(theirs).double()
    found = zip(ours(x, x, x), exact(*[x.double()] * 3), theirs(x, x, x), strict=True)
    for got, ref, eager in found:
        compare.check(got, ref, eager, what="from_torch")


def test_copies_and_pickles() -> None:
    _, ours = twins(torch.float32)
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)[0]
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin(x, x, x)[0], expected)
        assert twin.in_proj_weight is not ours.in_proj_weight
