"""Attention in forward mode: outputs and their derivatives along tangents, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, F64
from cases.attention import AttentionCase, regimes
from cases.attention_jvp import along, check_along, check_jvp, with_tangents
from cases.rules import RuleCase
from cases.varlen import VarlenCase, one_by_one
from compare import device_for
from fusedattn.ops.attention import op
from fusedattn.reference import functional as reference
from processes import in_a_new_process
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
KERNELS = pytest.mark.backends("fast", "triton")


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which library ops ran, and on how many batch entries."""
    found: list[tuple[str, int]] = []
    for each in (op, op.backward, op.forward_mode.op):

        def run(
            call: Any, kernels: Any, own: Any = each.library._run, name: str = each.name
        ) -> Any:
            found.append((name, call.q.shape[0]))
            return own(call, kernels)

        monkeypatch.setattr(each.library, "_run", run)
    return found


# --- every option, held to the derivative of the oracle -------------------------------------------

OPTIONS = regimes(
    ("plain", {}),
    ("causal", {"seq_q": 70, "seq_k": 133, "causal": True}),
    ("causal top left", {"seq_q": 37, "seq_k": 20, "causal": "top_left"}),
    ("rows that see nothing", {"seq_q": 40, "seq_k": 24, "causal": True}),
    ("window", {"seq_q": 90, "window": (17, 5)}),
    ("softcap", {"softcap": 1.5, "scale": -0.4}),
    ("softcap and bias", {"softcap": 2.0, "bias": (2, 2, 32, 32)}),
    ("bias for all", {"bias": (1, 1, 1, 32), "scale": 0.0}),
    ("mask and bias", {"seq_k": 133, "mask": (2, 1, 32, 133), "bias": (1, 2, 32, 133)}),
    ("slopes", {"alibi_slopes": (2, 2), "causal": True}),
    ("sinks", {"sinks": True, "kv_lengths": (0, 19)}),
    ("dropout", {"seq_q": 70, "dropout_p": 0.4, "causal": True}),
    ("grouped", {"heads": 6, "kv_heads": 2, "dim": 24, "dim_v": 40, "seq_k": 300}),
    ("one query", {"seq_q": 1, "seq_k": 150, "kv_lengths": (150, 77)}),
)  # fmt: skip


@KERNELS
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: AttentionCase, backend: str, ran: list) -> None:
    check_jvp(case, backend)
    assert ran == [("attention_jvp", case.batch)]


DTYPES = regimes(
    ("bf16", {"dtype": BF16, "bias": (2, 2, 70, 133)}),
    ("bf16, bias in fp32", {"dtype": BF16, "bias": (1, 2, 70, 133), "bias_dtype": F32}),
    ("fp16", {"dtype": F16, "softcap": 2.0}),
    ("fp16, large", {"dtype": F16, "dropout_p": 0.2}),
    seq_q=70, seq_k=133, causal=True,
)  # fmt: skip


@KERNELS
@pytest.mark.parametrize("case", DTYPES)
def test_half_precision(case: AttentionCase, backend: str) -> None:
    check_jvp(case, backend)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_each_instruction_set(dtype: torch.dtype, instruction_set: str) -> None:
    """Sizes at which all take part, with whole strips and with rests."""
    case = AttentionCase(
        dtype=dtype, batch=1, seq_q=403, seq_k=277, dim=40, dim_v=24, bias=(1, 2, 1, 277),
        window=(200, 100), kv_heads=1,
    )  # fmt: skip
    check_jvp(case, "cpu")
    check_jvp(AttentionCase(dtype=dtype, seq_q=130, dropout_p=0.3, softcap=3.0), "cpu")


@KERNELS
@pytest.mark.parametrize("names", ["q", "k", "v", "bias", "qv", "kv"])
def test_what_has_a_tangent(names: str, backend: str) -> None:
    case = AttentionCase(seq_q=50, seq_k=70, causal=True, bias=(2, 1, 50, 70))
    check_jvp(case, backend, (names,) if names == "bias" else tuple(names))


@KERNELS
@pytest.mark.parametrize(
    "rules",
    [("documents", "t5"), ("prefix",), ("blocks", "relative"), ("prefix", "blocks")],
    ids=" ".join,
)
def test_rules(rules: tuple[str, ...], backend: str) -> None:
    case = RuleCase(seq_q=70, seq_k=133, rules=rules)
    made, mask, bias = case.written_out()
    given = with_tangents(made, "qkv")

    def by_rule(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        given |= {"mask": mask, "bias": None if bias is None else bias[1](given["bias"])}
        return fusedattn.attention(q, k, v, **given, return_lse=True, backend=backend)

    if device_for(backend) == "cpu":
        actual = along(given, by_rule, case.options())
        if bias is not None:
            rows = torch.arange(133) - torch.arange(70)[:, None] - 63
            given["bias"] = made["bias"][rows.apply_(bias[2])].permute(2, 0, 1)[None]
        check_along(actual, given, case, reference.attention, label=f"{backend} {case}")


@KERNELS
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_packed(causal: bool | str, backend: str, ran: list) -> None:
    """Rows past the last offset are NaN, and so are their tangents."""
    case = VarlenCase(
        (5, 0, 33, 1), (9, 4, 20, 0), (3, 2), heads=4, kv_heads=2, causal=causal, sinks=True,
        alibi_slopes="sequences",
    )  # fmt: skip
    made = with_tangents(case.inputs(), "qkv")
    for name, offsets in (("q", "q"), ("k", "k"), ("v", "k")):
        made[f"t_{name}"][made[f"cu_seqlens_{offsets}"][-1] :] = float("nan")
    of_op = {"return_lse": True, "backend": backend}
    actual = along(
        made, lambda *x, **given: fusedattn.attention_varlen(*x, **given, **of_op), case.options()
    )
    assert ran == [("attention_jvp", 1)]

    def alone(*x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return one_by_one(reference.attention, *x, **given)

    present = {name: x.nan_to_num() if "t_" in name else x for name, x in made.items()}
    check_along(actual, present, case, alone, label=f"{backend} {case}")


# --- transforms and dual tensors ------------------------------------------------------------------


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = fusedattn.attention(
        q, k, v, bias=bias, causal=True, softcap=3.0, scale=0.7, return_lse=True
    )
    return out * lse[..., None].cos()


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = reference.attention(q, k, v, bias=bias, causal=True, softcap=3.0, scale=0.7)
    return out * lse[..., None].cos()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def composed(attend: Callable) -> Callable[[Tensor], Tensor]:
    """Of inputs that share a history, through a loss that is not linear."""
    return lambda x: attend(x.sin(), x.cos(), x * x, x @ x.mT).square()


def total(attend: Callable) -> Callable[[Tensor], Tensor]:
    return lambda x: composed(attend)(x).sum()


def derivative(function: Callable) -> Callable[[Tensor], Any]:
    return lambda x: jvp(function, (x,), (x.exp(),))


X, SAMPLES = random(1, 2, 4, 3), random(3, 2, 2, 4, 3)
NESTS: dict[str, tuple[Callable, Tensor, list[str]]] = {
    # what is made of an attention, of what, and the ops that run
    "jvp": (lambda f: derivative(composed(f)), X, ["jvp"]),
    "jacfwd": (lambda f: jacfwd(composed(f)), X, ["jvp"]),
    "vmap of jvp": (lambda f: vmap(derivative(composed(f))), SAMPLES, ["jvp"]),
    "jvp of vmap": (lambda f: derivative(vmap(composed(f))), SAMPLES, ["jvp"]),
    "hessian": (lambda f: hessian(total(f)), X, ["fwd", "jvp", "bwd"]),
    "jvp of grad": (lambda f: derivative(grad(total(f))), X, ["fwd", "jvp", "bwd"]),
    "grad of jvp": (lambda f: grad(lambda x: derivative(total(f))(x)[1]), X, ["jvp"]),
    "jacrev of jacfwd": (lambda f: jacrev(jacfwd(total(f))), X, ["jvp"]),
    "jacfwd of jacfwd": (lambda f: jacfwd(jacfwd(total(f))), X, ["jvp"]),
    "jvp thrice": (lambda f: derivative(derivative(derivative(total(f)))), X, ["jvp"]),
}


@pytest.mark.parametrize("nest", NESTS)
def test_transforms(nest: str, ran: list) -> None:
    transform, x, ops = NESTS[nest]
    torch.testing.assert_close(transform(fused)(x), transform(formula)(x), **CLOSE)
    assert [name.removeprefix("attention_") for name, _ in ran] == [
        {"fwd": "attention"}.get(name, name) for name in ops
    ]


@pytest.mark.parametrize("recorded", [False, True])
def test_dual_tensors(recorded: bool, ran: list) -> None:
    """Their derivatives, those of a gradient too, and the gradients of a derivative."""
    found = []
    for attend in (fused, formula):
        x, t = (random(2, 2, 4, n)[..., :3].clone().requires_grad_(recorded) for n in (3, 5))
        with forward_ad.dual_level():
            y = composed(attend)(forward_ad.make_dual(x, t))
            every = list(forward_ad.unpack_dual(y))
            if recorded:
                loss = every[1].sum() + every[0].cos().sum()
                every += torch.autograd.grad(loss, (x, t), create_graph=True)
                (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
                every += forward_ad.unpack_dual(dx)
            found.append([y.detach() for y in every])
    torch.testing.assert_close(*found, **CLOSE)
    assert ("attention_jvp", 2) in ran
    assert (("attention", 2) in ran) == recorded


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "table", "scale"])
@pytest.mark.parametrize("dual", [False, True], ids=["func", "dual"])
def test_other_tangents_are_the_formulas(name: str, dual: bool) -> None:
    q = random(1, 2, 5, 4)
    x = random(2) if name != "table" else random(5, 2)

    def attend(x: Tensor, q: Tensor) -> Tensor:
        given = {name: x} if name != "table" else {"bias": fusedattn.biases.relative(x)}
        return fusedattn.attention(q, q.sin(), q, causal=True, **given)

    leaf = x.clone().requires_grad_()
    want = torch.autograd.functional.jvp(lambda x, q: attend(x, q), (leaf, q), (x.cos(), q.cos()))
    if dual:
        with forward_ad.dual_level():
            given = (forward_ad.make_dual(y, y.cos()) for y in (x, q))
            found = tuple(forward_ad.unpack_dual(attend(*given)))
    else:
        found = jvp(attend, (x, q), (x.cos(), q.cos()))
    torch.testing.assert_close(found, want, **CLOSE)


def test_a_backend_without_forward_mode_leaves_it_to_the_next(ran: list) -> None:
    pytest.importorskip("fusedattn._cuda_emulated")
    q = random(1, 2, 16, 8).half()
    found = jvp(lambda q: fusedattn.attention(q, q, q, backend="cuda_emulated"), (q,), (q.cos(),))
    want = jvp(lambda q: fusedattn.attention(q, q, q), (q,), (q.cos(),))
    torch.testing.assert_close(found, want)
    assert [name for name, _ in ran] == ["attention_jvp"] * 2


def test_tangents_of_any_strides(backend: str) -> None:
    q, k, v = (random(2, 2, n, 8) for n in (30, 40, 40))
    t = random(2, 2, 8, 30).mT, random(1, 1, 1, 8).expand_as(k), random(2, 40, 2, 8).transpose(1, 2)

    def attend(*x: Tensor) -> Tensor:
        return fusedattn.attention(*x, backend=backend)

    found = jvp(attend, (q, k, v), t)
    want = jvp(attend, (q, k, v), tuple(x.contiguous() for x in t))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)


def test_no_buffer_grows_with_the_square_of_the_length(fast_backend: str) -> None:
    """At 4096 keys one matrix of scores would be 64 MiB; the process may grow by 24 MiB."""
    if fast_backend == "reference":
        pytest.skip("the reference keeps the whole matrix")
    code = (
        "import resource, torch, fusedattn\n"
        "def run(seq):\n"
        "    x = tuple(torch.randn(1, 1, seq, 64) for _ in 'qkv')\n"
        "    attend = lambda q, k, v: fusedattn.attention(q, k, v, causal=True, return_lse=True)\n"
        "    torch.func.jvp(attend, x, tuple(y.cos() for y in x))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = run(512)\n"
        "print(run(4096) - before)"
    )
    assert int(in_a_new_process(code)) < 24 * 1024
