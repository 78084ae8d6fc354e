"""The ops as they stay in a program: traced, exported, called raw, with whatever tensors come."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from ops import OPS, arguments, outputs, raw_calls
from processes import in_a_new_process

ARGUMENTS = pytest.mark.parametrize(("op", "name"), list(arguments()))


class Call(torch.nn.Module):
    """An op as a module of its tensors, in the order of its public arguments."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.run, self.names = OPS[op].run, list(OPS[op].tensors(torch.float32))

    def forward(self, *tensors: torch.Tensor):
        return self.run(**dict(zip(self.names, tensors, strict=True)))


def gradients(program, op, tensors):
    """The outputs and the gradients of the sum of their squares."""
    given = {
        name: x.clone().requires_grad_(name in OPS[op].differentiable)
        for name, x in tensors.items()
    }
    found = outputs(program(*given.values()))
    loss = sum(y.square().sum() for y in found)
    wanted = [x for x in given.values() if x.requires_grad]
    return [*found, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("op", OPS)
def test_an_exported_program_trains(op):
    call = OPS[op]
    made, given = call.tensors(torch.float32), call.tensors(torch.float32)
    program = torch.export.export(Call(op), tuple(made.values())).module()
    for found, want in zip(
        gradients(program, op, given), gradients(Call(op), op, given), strict=True
    ):
        assert torch.equal(found, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_saved_and_trains(op):
    """Made of tensors that require a gradient, as people make them, and checked by torch."""
    call = OPS[op]
    made = [
        x.requires_grad_(name in call.differentiable)
        for name, x in call.tensors(torch.float32).items()
    ]
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Call(op), tuple(made)), file)
    file.seek(0)
    given = call.tensors(torch.float32)
    for found, want in zip(
        gradients(torch.jit.load(file), op, given), gradients(Call(op), op, given), strict=True
    ):
        assert torch.equal(found, want)


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@ARGUMENTS
@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_whose_storage_was_freed(op, name, grad):
    call = OPS[op]
    tensors = call.tensors(torch.float32)
    with torch.set_grad_enabled(grad):
        if grad:
            tensors[call.differentiable[0]].requires_grad_()
        tensors[name] = freed(tensors[name].detach())
        with pytest.raises((ValueError, RuntimeError), match=r"without data|setStorage"):
            call.run(**tensors)


@ARGUMENTS
def test_a_tensor_that_stands_for_zeros(op, name):
    """torch's ZeroTensor, of forward mode and undefined gradients, has no memory."""
    tensors = OPS[op].tensors(torch.float32)
    zeros = torch.zeros_like(tensors[name])
    stand_in = torch._efficientzerotensor(zeros.shape, dtype=zeros.dtype)
    for found, want in zip(
        outputs(OPS[op].run(**tensors | {name: stand_in})),
        outputs(OPS[op].run(**tensors | {name: zeros})),
        strict=True,
    ):
        torch.testing.assert_close(found, want)


CHANGES = {
    "half": torch.Tensor.half,
    "double": torch.Tensor.double,
    "fewer": lambda x: x.narrow(-1, 0, x.shape[-1] - 1),
    "flat": torch.Tensor.flatten,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", [op for op in OPS if op != "add_sinusoidal"])
def test_a_saved_tensor_comes_back_as_it_was(op, change):
    """A hook may move or compress what was saved, not hand out something else."""
    call = OPS[op]
    tensors = call.tensors(torch.float32)
    for name in call.differentiable:
        tensors[name].requires_grad_()

    def unpack(x: torch.Tensor) -> torch.Tensor:
        return CHANGES[change](x) if x.is_floating_point() and x.dim() > 1 else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = outputs(call.run(**tensors))[0]
    with pytest.raises(RuntimeError, match="from a saved-tensor hook, expected it as it was saved"):
        out.sum().backward()


def hostile(value):
    """What may stand in place of an argument, and is wrong in most."""
    if isinstance(value, torch.Tensor):
        yield from (value[..., :-1], value[:1], value[None], value.flatten(), value.new_empty(0))
        yield from (value.half(), value.double(), value.int(), value.to("meta"), freed(value))
        yield value.expand(3, *value.shape)
        yield value.to(torch.complex64)
        yield value.repeat(*[3] * value.dim())
    elif isinstance(value, (bool, float, int)):
        yield from (-3, 2, 2**31, 2**62, float("nan"), float("inf"), True)
    elif isinstance(value, str):
        yield from ("triton", "cuda", "cuda_emulated", "reference", "nothing", "")
    elif isinstance(value, torch.dtype):
        yield from (torch.int32, torch.bool, torch.complex64, torch.float64, torch.bfloat16)
    elif isinstance(value, tuple):
        yield from ((8,), (3, 9), (), (2, 2, 2, 2, 2), (-1, 8))
    yield None


def call_hostile() -> int:
    """How many hostile calls were answered; for a process of its own, which they may kill."""
    count = 0
    for name, good in raw_calls():
        op = getattr(torch.ops.fusedattn, name)
        op(*good)
        for i, value in enumerate(good):
            for bad in hostile(value):
                args = [x.clone() if isinstance(x, torch.Tensor) else x for x in good]
                args[i] = bad
                try:
                    op(*args)
                except (ValueError, TypeError, RuntimeError):
                    count += 1
    return count


@pytest.mark.slow
def test_hostile_calls_of_raw_ops():
    """No call reads or writes out of bounds, or takes the process with it."""
    code = "import test_library_ops as t; print(t.call_hostile())"
    path = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); "
    assert int(in_a_new_process(path + code)) > 900


def test_a_raw_call_trains_on_the_backend_that_it_chose():
    def gradients(backend: str) -> list:
        torch.manual_seed(3)
        found = []
        for name, args in raw_calls(backend):
            if name.endswith("_fwd"):
                x = args[0].requires_grad_()
                y, *_ = outputs(getattr(torch.ops.fusedattn, name)(*args))
                found += torch.autograd.grad(y.float().square().sum(), x)
        return found

    for x, want in zip(gradients("auto"), gradients("cpu"), strict=True):
        assert torch.equal(x, want)


def test_the_raw_op_in_place_has_no_gradient():
    (args,) = (args for name, args in raw_calls() if name == "rotary_")
    x = args[0].requires_grad_().clone()
    with pytest.raises(RuntimeError, match=r"call fusedattn\.apply_rotary instead"):
        torch.ops.fusedattn.rotary_(x, *args[1:])


def test_pages_are_of_a_cache():
    (_, args), *_ = raw_calls()
    table = torch.zeros(len(args[0]), 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="got block_table without a cache"):
        torch.ops.fusedattn.attention_fwd(*args[:3], block_table=table)
    with pytest.raises(ValueError, match="got a cache without kv_lengths"):
        torch.ops.fusedattn.attention_fwd(*args[:3], cached=True)


class EveryOp(torch.nn.Module):
    """One call of each, of all their tensors."""

    def forward(self, tensors: dict[str, dict[str, torch.Tensor]]):
        return [x for op, given in tensors.items() for x in outputs(OPS[op].run(**given))]


SAVED = Path(__file__).parent / "saved" / "every_op-0.1.0.pt2"


def test_a_program_of_the_first_release_still_loads():
    """Saved by `python tests/test_library_ops.py`, once; its ops have the arguments of then."""
    given = {op: call.tensors(torch.float32) for op, call in OPS.items()}
    found = torch.export.load(SAVED).module()(given)
    for x, want in zip(found, EveryOp()(given), strict=True):
        assert torch.equal(x, want)


if __name__ == "__main__":
    given = {op: call.tensors(torch.float32) for op, call in OPS.items()}
    SAVED.parent.mkdir(exist_ok=True)
    torch.export.save(torch.export.export(EveryOp(), (given,)), SAVED)
