"""The autograd contract that every op keeps: derivatives of any order, memory, transforms."""

from __future__ import annotations

import gc
import weakref

import fusedattn
import pytest
import torch
from ops import OPS, few, outputs
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
VARIANTS = [(op, i) for op in OPS for i in range(len(OPS[op].variants) + 1)]
each_op = pytest.mark.parametrize("op", OPS)
pytestmark = pytest.mark.backends("fast", "cuda_emulated")


def leaves(op: str, dtype: torch.dtype = torch.float64, n: int = 5) -> dict[str, Tensor]:
    made = OPS[op].tensors(dtype, n)
    return {name: x.requires_grad_(name in OPS[op].differentiable) for name, x in made.items()}


def of_leaves(op: str, made: dict[str, Tensor], run=None, **options):
    """The op as a function of its differentiable tensors; −∞, which has no slope, is 0."""
    names = [name for name in OPS[op].differentiable if name in made]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        tensors = {**made, **dict(zip(names, given, strict=True)), **options}
        found = outputs((run or OPS[op].run)(**tensors))
        return tuple(y.masked_fill(y.isinf(), 0.0) for y in found)

    return function, [made[name] for name in names]


@pytest.mark.parametrize(("op", "variant"), VARIANTS)
@pytest.mark.parametrize("all_tensors", [True, False], ids=["all", "few"])
def test_derivatives(op, variant, all_tensors, fast_backend):
    """The first and the second; where rows see nothing too."""
    options = (*OPS[op].variants, {})[variant] | {"backend": fast_backend}
    n = 5 if op == "attention" else 3
    made = leaves(op, n=n) if all_tensors else few(op, torch.float64, n)
    for name in OPS[op].differentiable if not all_tensors else ():
        if name in made:
            made[name].requires_grad_()
    function, given = of_leaves(op, made, **options)
    assert gradcheck(function, given, fast_mode=op == "attention")
    assert gradgradcheck(function, given, fast_mode=True)


@each_op
def test_gradient_of_each_alone(op, backend):
    """What one tensor gets does not depend on who else asks, and nobody else gets one."""
    made = leaves(op, torch.float32)

    def gradients(names) -> dict[str, Tensor | None]:
        given = {name: x.detach().requires_grad_(name in names) for name, x in made.items()}
        sum(y.square().sum() for y in outputs(OPS[op].run(**given, backend=backend))).backward()
        return {name: x.grad for name, x in given.items()}

    everything = gradients(OPS[op].differentiable)
    for name in OPS[op].differentiable:
        alone = gradients((name,))
        assert torch.equal(alone[name], everything[name])
        assert [x for x in made if alone[x] is not None] == [name]


@pytest.mark.backends("fast", "triton", "cuda_emulated")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@each_op
def test_without_a_gradient_there_is_no_graph(op, backend):
    made = leaves(op, torch.float32)
    want = outputs(OPS[op].run(**made, backend=backend))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = outputs(OPS[op].run(**made, backend=backend))
        assert not any(y.requires_grad for y in found)
        assert all(map(torch.equal, found, want))


LAYOUTS = {
    "one number": lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
    "rows": lambda y: torch.randn_like(y[..., :1]).expand_as(y),
    "stride 2": lambda y: torch.randn_like(y.repeat(*[1] * (y.dim() - 1), 2))[..., ::2],
    "transposed": lambda y: torch.randn_like(y.mT.contiguous()).mT,
    "batch": lambda y: torch.randn_like(y[:1]).expand_as(y),
    "slice": lambda y: torch.cat((y, y, y), -1)[..., 1 : y.shape[-1] + 1],
}


@pytest.mark.backends("fast")
@pytest.mark.parametrize("layout", LAYOUTS)
@each_op
def test_the_gradient_that_comes_in(op, layout, backend):
    """flash-attention#355, Liger-Kernel#376: read as it lies, and left as it was; again and again.

    flash-attention#359: with retain_graph, gradients do not drift.
    """
    made = leaves(op, torch.float32)
    found = outputs(OPS[op].run(**made, backend=backend))[0]
    given = [made[name] for name in OPS[op].differentiable]
    dout = LAYOUTS[layout](found.detach())
    before = dout.clone()
    grads = [
        torch.autograd.grad(found, given, dy, retain_graph=True)
        for dy in (dout, dout, before.contiguous())
    ]
    assert torch.equal(dout, before)
    for pair in zip(grads[0] * 2, grads[1] + grads[2], strict=True):
        assert torch.equal(*pair)


@each_op
def test_a_forward_without_a_backward_frees_everything(op, backend):
    """pytorch#25340: an output kept on its own node is a cycle that only the collector ends."""
    made = leaves(op, torch.float32)
    gc.collect()
    gc.disable()
    try:
        found = outputs(OPS[op].run(**made, backend=backend))
        watched = [weakref.ref(x) for y in found for x in (y, y.grad_fn)]
        del found
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


@pytest.mark.backends("fast")
@each_op
def test_saved_tensors_pass_through_hooks(op, backend):
    """Everything that is kept can be moved elsewhere, and lie otherwise; nothing else is kept."""
    made = leaves(op, torch.float32)
    given, packed = [made[name] for name in OPS[op].differentiable], []

    def gradients() -> tuple[Tensor, ...]:
        found = outputs(OPS[op].run(**made, backend=backend))
        return torch.autograd.grad(found, given, [y.detach().cos() for y in found])

    def pack(x: Tensor) -> Tensor:
        packed.append(x.shape)
        return torch.stack([x, x], -1)

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x[..., 0]):
        found = gradients()
    assert all(map(torch.equal, found, want))
    assert len(packed) == OPS[op].kept


@each_op
def test_transforms(op, fast_backend):
    """vmap, grad, jvp and forward mode, alone and nested, as of the formula."""
    made = {name: x.detach() for name, x in leaves(op).items()}
    fused, given = of_leaves(op, made, backend=fast_backend)
    formula, _ = of_leaves(op, made, OPS[op].formula)

    def same(transform) -> None:
        torch.testing.assert_close(transform(fused), transform(formula), **CLOSE)

    tangents = tuple(torch.randn_like(x) for x in given)
    batch = [torch.stack([x, x.sin(), x.cos()]) for x in given]
    every = tuple(range(len(given)))
    same(lambda f: torch.vmap(f)(*batch))
    same(lambda f: torch.vmap(f, (0, *[None] * (len(given) - 1)))(batch[0], *given[1:]))
    same(lambda f: torch.func.jvp(f, tuple(given), tangents))

    def grad(f):
        return torch.func.grad(lambda *x: sum(y.square().sum() for y in f(*x)), every)

    same(lambda f: grad(f)(*given))
    same(lambda f: torch.vmap(grad(f))(*batch))
    same(lambda f: torch.func.jvp(grad(f), tuple(given), tangents))
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(x.clone().requires_grad_(requires_grad), t)
                for x, t in zip(given, tangents, strict=True)
            ]
            found = [forward_ad.unpack_dual(y).tangent for y in fused(*dual)]
        want = torch.func.jvp(formula, tuple(given), tangents)[1]
        torch.testing.assert_close(found, list(want), **CLOSE)


@pytest.mark.parametrize("name", [op.function for op in OPS.values()])
def test_functions_refuse_transforms(name):
    """They have no rule for torch.func; its `apply` says so, and is theirs in public."""
    function = getattr(fusedattn.autograd, name)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: function.apply(x).sum())(torch.randn(3))
