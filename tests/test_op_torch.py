"""Every op as a citizen of torch: op checks, compiled, on meta, on nothing, saved and traced."""

from __future__ import annotations

import pytest
import torch
from ops import OPS, few, outputs, raw_calls

each_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("number", range(len(list(raw_calls()))))
def test_opcheck(number, fast_backend):
    name, args = list(raw_calls(fast_backend))[number]
    found = torch.library.opcheck(getattr(torch.ops.fusedattn, name).default, args)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("dynamic", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@each_op
def test_compiled(op, dynamic, dtype, fast_backend):
    """One graph, at any length; the same numbers and gradients."""
    call = OPS[op]

    def function(**given):
        given[call.needed[0]] = 2 * given[call.needed[0]]
        return [y.sin() for y in outputs(call.run(**given, backend=fast_backend))]

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (4, 9, 7) if dynamic else (4, 9):
        made = call.tensors(dtype, n)
        given = [made[name].requires_grad_() for name in call.differentiable]
        pair = compiled(**made), function(**made)
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(
            *(torch.autograd.grad(sum(y.float().sum() for y in found), given) for found in pair)
        )
    torch._dynamo.reset()


@each_op
def test_meta(op):
    made = OPS[op].tensors(torch.bfloat16)
    want = outputs(OPS[op].run(**made))
    given = {name: x.to("meta") for name, x in made.items()}
    leaf = given[OPS[op].differentiable[0]].requires_grad_()
    found = outputs(OPS[op].run(**given))
    assert all(y.is_meta for y in found)
    assert [(y.shape, y.dtype, y.stride()) for y in found] == [
        (y.shape, y.dtype, y.stride()) for y in want
    ]
    found[0].sum().backward()
    assert leaf.grad.shape == leaf.shape


@each_op
def test_no_batch(op, backend):
    """pytorch#28614, xformers#852"""
    made = {n: x[:0] if x.dim() > 2 else x for n, x in few(op).items()}
    leaf = made[OPS[op].needed[0]].requires_grad_()
    out = outputs(OPS[op].run(**made, backend=backend))[0]
    out.sum().backward()
    assert out.shape == leaf.grad.shape == leaf.shape
