"""Ops under torch.func's transforms and on dual tensors: kernels serve them where they can.

`grad`, `vjp` and `jacrev` run kernels, forward and backward, `vmap` folds what it maps over into
the batch, and forward mode is an op of its own where there is one; the rest is the op's formula.
Transforms nest: each takes its own level off the tensors and calls what is here again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_stack = torch._C._functorch.peek_interpreter_stack
_JVP = torch._C._functorch.TransformType.Jvp


@dataclasses.dataclass(frozen=True, eq=False)
class Folding:
    """How a call that is mapped over becomes one call.

    batched: fields whose first dimension is the batch; shared: those where it may also be 1. One of
    another field that differs from sample to sample is not folded.
    takes(call) -> whether a call can be folded at all.
    summed(call) -> of the outputs those fields whose gradient they are, None of other outputs: what
        is shared has a gradient of its own in each sample.
    """

    batched: frozenset[str]
    shared: frozenset[str]
    takes: Callable[[Any], bool]
    summed: Callable[[Any], Sequence[str | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardMode:
    """How a call and the tangents of its tensors become one call.

    op: of that call; its outputs are those of the first and then the tangent of each.
    along(call, tangents) -> the call, or None where the op has no place for a tangent. `tangents`
        has an entry for each tensor field, None for zero.
    """

    op: Any
    along: Callable[[Any, Sequence[Tensor | None]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call without its tensors; places: which of its fields they are."""

    op: Any
    backend: str
    fields: tuple[Any, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, op: Any, backend: str, call: Any) -> tuple[Call, list[Tensor]]:
        n = op.library.tensors
        places = tuple(i for i in range(n) if call[i] is not None)
        return cls(op, backend, (*(None,) * n, *call[n:]), places), [call[i] for i in places]

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        """With tensors in their places."""
        fields = list(self.fields)
        for place, x in zip(self.places, tensors, strict=True):
            fields[place] = x
        return self.op.library.call(*fields)

    def present(self, call: Any) -> list[bool]:
        """Which outputs there are."""
        library = self.op.library
        return list(library.wanted(call)) if library.wanted else [True] * len(library.outputs)

    def along(
        self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The outputs and their tangents in one call, None where no op has both."""
        mode = self.op.forward_mode
        if mode is None:
            return None
        given: list[Tensor | None] = [None] * self.op.library.tensors
        for place, x in zip(self.places, tangents, strict=True):
            given[place] = x
        call = mode.along(self.whole(tensors), given)
        if call is None:
            return None
        found = run(mode.op, call, mode.op.nearest(self.backend, call))
        half = len(found) // 2
        return found[:half], found[half:]

    def formula(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs that there are, by the formula, in the dtype of the kernel's."""
        call = self.whole(tensors)
        return tuple(x for x in self.op.formula(call) if x is not None)


def run(op: Any, call: Any, backend: str) -> tuple[Any, ...]:
    """The outputs of a call whose tensors are those of a transform."""
    about, tensors = Call.of(op, backend, call)
    found = iter(_serve(about, tensors))
    return tuple(next(found) if there else None for there in about.present(call))


def _serve(about: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those outputs that there are, with their tangents where the current level has such."""
    found = _duals(about, tensors)
    return _Transformed.apply(about, *tensors) if found is None else found


def _duals(about: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The outputs as dual tensors, in one pass with their tangents; None where that is not served.

    Not where the current level records a gradient: that of an output would be the formula's, and
    of tensors without their tangents.
    """
    if about.op.forward_mode is None or not _in_forward_mode():
        return None
    pairs = [_unpacked(x) for x in tensors]
    moved = [t for _, t in pairs if t is not None]
    if not moved or (torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *moved))):
        return None
    found = about.along(*zip(*pairs, strict=True))
    return None if found is None else tuple(map(forward_ad.make_dual, *found))


def _in_forward_mode() -> bool:
    """Whether the innermost level, of torch.func or of dual tensors alone, is forward mode's."""
    if forward_ad._current_level < 0:
        return False
    innermost = _stack()
    return innermost is None or innermost.key() == _JVP


class _Transformed(torch.autograd.Function):
    """apply(Call, *tensors) -> those outputs that there are."""

    @staticmethod
    def forward(about: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = about.op.library(about.whole(tensors), about.backend)
        return tuple(x for x in found if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        about, *tensors = inputs
        ctx.about, ctx.count = about, len(tensors)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        about, saved = ctx.about, ctx.saved_tensors
        tensors, outputs = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad[1:]
        if all(dout is None for dout in douts):
            return (None,) * (1 + ctx.count)
        op, call = about.op, about.whole(tensors)
        if op.pull_back is None or len(outputs) > op.cotangents:
            return None, *_formula_gradients(about, tensors, wanted, douts)
        asked = [False] * op.library.tensors
        for place, each in zip(about.places, wanted, strict=True):
            asked[place] = each
        kept, rest = op.keep(call, outputs, asked)
        grads = op.pull_back(
            douts, kept, rest, asked, lambda call: run(op.backward, call, about.backend)
        )
        found = (grads[place] for place in about.places)
        return None, *(
            _in_dtype(x, of) if each else None
            for x, of, each in zip(found, tensors, wanted, strict=True)
        )

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        # torch has turned duals off here, at the levels below too, which may go on differentiating.
        with forward_ad._set_fwd_grad_enabled(True):
            about, tensors = ctx.about, [_unpacked(x)[0] for x in ctx.saved_tensors]
            if (found := about.along(tensors, tangents)) is not None:
                return found[1]
            moved = [i for i, x in enumerate(tangents) if x is not None]

            def formula(*some: Tensor) -> tuple[Tensor, ...]:
                given = list(tensors)
                for i, x in zip(moved, some, strict=True):
                    given[i] = x
                return about.formula(given)

            return _along(formula, [tensors[i] for i in moved], [tangents[i] for i in moved])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], about: Call, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, size = in_dims[1:], info.batch_size
        folded = _fold(about, tensors, dims, size)
        if folded is None:
            found = torch.vmap(
                lambda *x: about.formula(x), tuple(dims), randomness=info.randomness
            )(*tensors)
        else:
            call, within = folded
            whole = about.op.library.call
            new, parts = Call.of(about.op, about.backend, call)
            outputs = _serve(new, parts)
            there = about.present(about.whole(tensors))
            names = about.op.folding.summed(call)
            names = [name for name, each in zip(names, there, strict=True) if each]
            found = tuple(
                _unfold(x, size, name is not None and within[whole._fields.index(name)] == 1)
                for x, name in zip(outputs, names, strict=True)
            )
        return found, (0,) * len(found)


def _along(
    formula: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The derivative of `formula` along the tangents."""
    if _stack() is not None:
        return torch.func.jvp(formula, tuple(primals), tuple(tangents))[1]
    # On dual tensors alone, where torch.func.jvp would open a second level, which torch has not.
    pairs = [_unpacked(y) for y in formula(*map(forward_ad.make_dual, primals, tangents))]
    return tuple(torch.zeros_like(y) if t is None else t for y, t in pairs)


def _unpacked(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the innermost level the primal and the tangent, None for zero."""
    if not x.is_floating_point():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def _in_dtype(x: Tensor | None, of: Tensor) -> Tensor | None:
    return None if x is None else x.to(of.dtype)


def _formula_gradients(
    about: Call, tensors: Sequence[Tensor], wanted: Sequence[bool], douts: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of Σ dout · output over the outputs of the formula."""
    chosen = [i for i, each in enumerate(wanted) if each]
    given = [i for i, dout in enumerate(douts) if dout is not None]

    def formula(*some: Tensor) -> tuple[Tensor, ...]:
        every = list(tensors)
        for i, x in zip(chosen, some, strict=True):
            every[i] = x
        outputs = about.formula(every)
        return tuple(outputs[i] for i in given)

    found_by: Any = torch.func.vjp(formula, *(tensors[i] for i in chosen))
    outputs, pull_back = found_by
    cotangents = tuple(
        douts[i].to(x.dtype)  # type: ignore[union-attr]
        for i, x in zip(given, outputs, strict=True)
    )
    found = dict(zip(chosen, pull_back(cotangents), strict=True))
    return [found.get(i) for i in range(len(tensors))]


def _fold(
    about: Call, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> tuple[Any, list[int]] | None:
    """The call on the batches of all samples, and the batch that each of its fields had; or None
    where there is none."""
    folding, library = about.op.folding, about.op.library
    names = [library.call._fields[place] for place in about.places]
    known = folding.batched | folding.shared
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    own = [x if dim is None else x[0] for x, dim in zip(moved, dims, strict=True)]
    call = about.whole(own)
    if size == 0 or not folding.takes(call):
        return None
    if any(dim is not None and name not in known for name, dim in zip(names, dims, strict=True)):
        return None
    batch = call.q.shape[0]
    apart = {name for name in folding.summed(call) if name is not None}
    fields, within = list(about.fields), [0] * len(about.fields)
    for place, name, x, dim in zip(about.places, names, moved, dims, strict=True):
        within[place] = batch
        if name in known:
            mapped = dim is not None
            within[place] = x.shape[int(mapped)]
            if mapped or within[place] != 1 or name in folding.batched or name in apart:
                x = x if mapped else x[None]
                x = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
        fields[place] = x
    return library.call(*fields), within


def _unfold(x: Tensor, size: int, shared: bool) -> Tensor:
    """(N · B, …) as (N, B, …), or where B entries shared what this is the gradient of (N, 1, …)."""
    x = x.unflatten(0, (size, -1))
    return x.sum(1, keepdim=True) if shared and x.shape[1] != 1 else x
