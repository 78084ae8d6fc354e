"""torch's scaled_dot_product_attention by our op: the function, and the switch in torch's place."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from cases import graded
from compare import check
from torch import Tensor
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported

sdpa = fusedattn.integrations.sdpa
TORCH = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of our op."""
    seen: list[int] = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(1)
            return function(*args, **options)

        return call

    function = sys.modules["fusedattn.integrations.sdpa"]
    monkeypatch.setattr(function, "attention", counted(fusedattn.attention))
    switch = sys.modules["fusedattn.integrations._sdpa_switch"]
    monkeypatch.setattr(switch, "_flash", counted(switch._flash))
    return seen


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    sdpa.disable()
    assert F.scaled_dot_product_attention is TORCH
    assert torch.backends.mha.get_fastpath_enabled()


class Case(NamedTuple):
    """Shapes of query, key, value and of a mask of floats, and further arguments."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    attn_mask: tuple[int, ...] | None = None
    options: dict[str, Any] | None = None


X, Y = (2, 3, 17, 16), (2, 3, 33, 16)
CASES = {
    "plain": Case(Y, Y, Y),
    "top-left": Case(X, Y, Y, options={"is_causal": True}),
    "scaled": Case(X, X, X, options={"scale": -0.7}),
    "3-D, a mask for all": Case(X[1:], X[1:], X[1:], (17, 17)),
    "2-D": Case((17, 16), (9, 16), (9, 8), (17, 9)),
    "Dv, a row of mask": Case(X, Y, (2, 3, 33, 24), (2, 1, 1, 33)),
    "5-D, broadcast": Case((2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (2, 4, 3, 7, 8), (4, 1, 5, 7)),
    "grouped": Case((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (6, 1, 9), {"enable_gqa": True}),
    "one head of keys": Case((2, 6, 9, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "one head of queries": Case((2, 1, 9, 8), (2, 6, 9, 8), (2, 6, 9, 8)),
    "batch of 1": Case((1, 2, 9, 8), (3, 2, 9, 8), (3, 2, 9, 8)),
}


def compared(ours: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> None:
    """Output and all gradients, that of the mask too, against torch's formula in fp64."""
    shapes = {n: x for n, x in case._asdict().items() if n != "options" and x is not None}
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        def call(**tensors: Tensor) -> dict[str, Tensor]:
            return {"out": function(**tensors, **case.options or {})}

        return graded(call, made, {"out": cotangent}, dtype)

    with sdpa_kernel(SDPBackend.MATH):  # which is torch's, whether the switch is on or off
        with torch.no_grad():
            cotangent = torch.randn_like(imported(**made, **case.options or {}))
        want, eager = run(imported, torch.float64), run(imported, dtype)
    got = run(ours, dtype)
    for name, ref in want.items():
        rows = made["query"].numel() if name == "dattn_mask" else 1
        gradient = name != "out"
        check(got[name], ref, eager[name], what=name, case=case, gradient=gradient, rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_function(case: str, dtype: torch.dtype) -> None:
    compared(fusedattn.scaled_dot_product_attention, CASES[case], dtype)


@pytest.mark.parametrize("name", ["F", "imported"])
@pytest.mark.parametrize("case", CASES)
def test_in_torchs_place(case: str, name: str, calls: list[int]) -> None:
    def ours(**given: Any) -> Tensor:
        return (F.scaled_dot_product_attention if name == "F" else imported)(**given)

    with sdpa():
        compared(ours, CASES[case], torch.float32)
    assert calls == [1]


def test_masks_of_bools_and_rows_that_see_nothing() -> None:
    q, k, v = torch.randn(3, 2, 3, 17, 16)
    mask = torch.rand(2, 1, 17, 17) < 0.5
    mask[0, 0, 3] = False
    want = imported(q, k, v, mask & torch.ones(17, 17, dtype=torch.bool).tril())
    got = fusedattn.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(got, want)
    assert (got[0, :, 3] == 0).all()
    mask = torch.randn(17, 17)  # of float32, for other dtypes of queries
    for dtype, eps in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        x, y, z = (each.to(dtype) for each in (q, k, v))
        got = fusedattn.scaled_dot_product_attention(x, y, z, mask)
        want = imported(x.double(), y.double(), z.double(), mask.double())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=eps)


def test_heads_of_values_alone() -> None:
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 1, 9, 8), torch.randn(2, 4, 9, 8)
    got = fusedattn.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, imported(q, k.expand_as(q), v))


def test_dropout_and_its_seed() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    found = []
    with sdpa():
        for _ in range(2):
            torch.manual_seed(3)
            found.append(F.scaled_dot_product_attention(q, k, v, None, 0.25))
    torch.manual_seed(3)
    want = fusedattn.attention(q, k, v, dropout_p=0.25)
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], want)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a mask of integers": ({"attn_mask": torch.ones(4, 4, dtype=torch.uint8)}, TypeError,
                           "got attn_mask of dtype torch.uint8, expected bool"),
    "no tensor": ({"attn_mask": 1.0}, TypeError, "got attn_mask of type float"),
    "a mask too large": ({"attn_mask": torch.ones(4, 5)}, ValueError, r"attn_mask of shape \(4, 5"),
    "heads": ({"key": torch.randn(2, 2, 4, 8), "value": torch.randn(2, 2, 4, 8)}, ValueError,
              "got 4, 2 and 2 heads of query, key and value, expected one number, or enable_gqa"),
    "groups": ({"key": torch.randn(2, 3, 4, 8), "value": torch.randn(2, 3, 4, 8),
                "enable_gqa": True}, ValueError, "expected a multiple"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal of type int, expected a bool"),
    "a list": ({"query": [1.0]}, TypeError, "got a list among query, key, value"),
    "one dimension": ({"query": torch.randn(8)}, ValueError, "expected 3 dimensions or more"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changed, kind, message = BAD[case]
    given = {name: torch.randn(2, 4, 4, 8) for name in ("query", "key", "value")}
    with pytest.raises(kind, match=message):
        fusedattn.scaled_dot_product_attention(**given | changed)


# --- the switch ----------------------------------------------------------------------------------


def test_nests_and_restores(calls: list[int]) -> None:
    x = torch.randn(1, 2, 9, 8)

    def ours() -> bool:
        before = len(calls)
        F.scaled_dot_product_attention(x, x, x)
        imported(x, x, x)
        assert len(calls) - before in (0, 2)
        return len(calls) > before

    assert not ours()
    with sdpa():
        assert ours()
        with sdpa():
            assert ours()
        assert ours()
        sdpa.disable()  # of what nobody has enabled
        assert ours()
    assert not ours()
    sdpa.enable()
    sdpa.enable()
    with pytest.raises(KeyError), sdpa():
        raise KeyError
    assert ours()
    kept = F.scaled_dot_product_attention
    sdpa.disable()
    assert not ours()
    assert F.scaled_dot_product_attention is TORCH
    kept(x, x, x)  # who imported it meanwhile
    assert not ours()
    with sdpa():
        kept(x, x, x)
        assert ours()


def test_threads_hold_it_together(calls: list[int]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with sdpa():
            inside.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert inside.wait(60)
    with sdpa():
        pass
    assert sdpa.enabled  # the other is still within
    leave.set()
    other.join()
    assert not sdpa.enabled


def test_torchs_list_of_flash_attentions() -> None:
    registry = torch.nn.attention
    if not hasattr(registry, "register_flash_attention_impl"):
        pytest.skip("this torch has none")

    class Other:
        def remove(self) -> None:
            pass

    registry.register_flash_attention_impl("other", register_fn=Other)
    registry.activate_flash_attention_impl("other")
    with sdpa():
        assert registry.current_flash_attention_impl() == "fusedattn"
    assert registry.current_flash_attention_impl() == "other"
    sdpa.enable()
    registry.activate_flash_attention_impl("other")  # takes our place
    assert not sdpa.enabled
    assert F.scaled_dot_product_attention is TORCH
    registry.restore_flash_attention_impl()


def test_somebody_else_patches_on_top(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    x = torch.randn(1, 2, 9, 8)
    sdpa.enable()
    beneath = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: beneath(*a, **k))
    sdpa.disable()
    F.scaled_dot_product_attention(x, x, x)
    assert not calls
    monkeypatch.undo()
    F.scaled_dot_product_attention = TORCH


def test_what_is_left_to_torch(calls: list[int]) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    with sdpa():
        with sdpa_kernel(SDPBackend.MATH):  # asked for by name
            F.scaled_dot_product_attention(q, k, v)
            mask = bias.causal_lower_right(5, 5)
            got = [f(q, k, v, mask) for f in (F.scaled_dot_product_attention, imported)]
        assert F.scaled_dot_product_attention(*(x[..., :0] for x in (q, k)), v).shape == v.shape
        rows = [torch.randn(2, n, 8) for n in (3, 5)]
        nested = torch.nested.nested_tensor(rows, layout=torch.strided)
        F.scaled_dot_product_attention(nested, nested, nested)
        assert not calls
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        got += [f(q, k, v, mask) for f in (F.scaled_dot_product_attention, imported)]
        for each in got:
            torch.testing.assert_close(each, want)
        jagged = torch.nested.nested_tensor([x.transpose(0, 1) for x in rows], layout=torch.jagged)
        jagged = jagged.transpose(1, 2)
        out = F.scaled_dot_product_attention(jagged, jagged, jagged).transpose(1, 2)
        assert len(calls) == 4
    for part, x in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(part.transpose(0, 1), imported(x, x, x))


def test_contiguous_where_torch_is() -> None:
    """So that what callers make a view of stays one."""
    x = torch.randn(2, 3, 5, 8)
    assert fusedattn.scaled_dot_product_attention(x, x, x).is_contiguous()
    y = torch.randn(2, 5, 3, 8).transpose(1, 2)
    assert fusedattn.scaled_dot_product_attention(y, y, y).transpose(1, 2).is_contiguous()
