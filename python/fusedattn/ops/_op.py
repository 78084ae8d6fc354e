"""One way for all ops: a checked call is served, differentiated, or written as its formula.

An op's call is a NamedTuple of tensors, plain options and, last, a config. It is built once by the
public function and handed on as it is: to the backend's check, to autograd, to the library op, to
the kernel. What an op has to say of itself stands in `Op`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _transforms
from ._library import LibraryOp, differentiated, transformed, watched
from ._registry import Backend, Choice

Outputs = tuple[Any, ...]  # tensors, None where one is absent

# Looked up once: what follows runs on every call.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Op(Choice):
    """An op: its backends in order of preference, its library op, its formula and its gradient.

    formula(call) -> outputs, in torch's own ops and differentiable to any order.
    differentiable: the indices of the call's tensors that may require a gradient.
    cotangents: how many of the outputs, the first ones, have a gradient.
    backward: the op of the gradient.
    keep(call, outputs, wanted) -> (tensors, rest), what the gradient needs; `wanted` says which of
        the call's tensors have one.
    pull_back(douts, tensors, rest, wanted, run) -> the gradient of each of the call's tensors, by
        `run`, which is `backward` of a call. Without one the op is differentiated by its formula.
    folding: how a call under vmap becomes one call; without it transforms get the formula.
    forward_mode: how a call and the tangents of its tensors do.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend],
        library: LibraryOp,
        formula: Callable[[Any], Outputs],
        *,
        differentiable: Sequence[int] = (),
        cotangents: int = 0,
        backward: Op | None = None,
        keep: Callable[..., tuple[Outputs, tuple[Any, ...]]] | None = None,
        pull_back: Callable[..., Outputs] | None = None,
        folding: _transforms.Folding | None = None,
        forward_mode: _transforms.ForwardMode | None = None,
    ) -> None:
        super().__init__(name, backends)
        self.library, self.formula, self.differentiable = library, formula, tuple(differentiable)
        self._from_the_last = sorted(differentiable, reverse=True)
        self.cotangents, self.backward = cotangents, backward
        self.keep, self.pull_back = keep, pull_back
        self.folding, self.forward_mode = folding, forward_mode
        title = name.title().replace("_", "")
        first, every = (_Differentiable, _Whole) if pull_back else (_ByFormula, _ByFormula)
        self._function, self._whole = (
            direct(type(f"{title}Function", (base,), {})) for base in (first, every)
        )
        library.belongs_to(self)

    def __call__(self, call: Any, requested: str) -> Outputs:
        """The outputs of a checked call."""
        backend = self.choose(requested, call)
        if transformed():
            if self.folding is not None and not watched():
                return _transforms.run(self, call, backend)
            return self.formula(call)
        if _grad_enabled() and self.records(call) and not watched():
            return self.record(call, backend, self.library)
        return self.library(call, backend)

    def records(self, call: Any) -> bool:
        """Whether a tensor of the call requires a gradient."""
        for i in self.differentiable:
            x = call[i]
            if x is not None and x.requires_grad:
                return True
        return False

    def record(self, call: Any, backend: str, serve: Callable[[Any, str], Outputs]) -> Outputs:
        """The call as one node of autograd's graph: those outputs that have a gradient.

        serve(call, backend) -> all outputs.
        """
        return self._function.apply(self, call, backend, serve, *self._inputs(call))

    def record_whole(self, call: Any, backend: str) -> Outputs:
        """The same of a call of the library op, with all outputs."""
        return self._whole.apply(self, call, backend, self.library.dispatch, *self._inputs(call))

    def _inputs(self, call: Any) -> Outputs:
        """The call's tensors for a node of the graph, but the last where they want no gradient."""
        if self.pull_back is None:  # the formula's derivative keeps what the node is given
            return call[: self.library.tensors]
        for i in self._from_the_last:
            if call[i] is not None:
                return call[: i + 1]
        return ()


def _serve(ctx: Any, leading: int, op: Op, call: Any, backend: str, serve: Any) -> Outputs:
    """The outputs that have a gradient; the tensors stand behind `leading` other arguments."""
    outputs = serve(call, backend)
    n = op.library.tensors
    wanted = ctx.needs_input_grad[leading : leading + n]
    if len(wanted) < n:  # fields that were left out
        wanted += (False,) * (n - len(wanted))
    ctx.wanted = wanted
    saved, ctx.rest = op.keep(call, outputs, wanted)  # type: ignore[misc]
    keep(ctx, *saved)
    ctx.set_materialize_grads(False)
    ctx.op, ctx.backend, ctx.leading = op, backend, leading
    return outputs[: op.cotangents]


class _Differentiable(torch.autograd.Function):
    """An op that knows its gradient: apply(op, call, backend, serve, *tensors) -> outputs."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, call: Any, backend: str, serve: Any, *tensors: Tensor | None
    ) -> Outputs:
        return _serve(ctx, 4, op, call, backend, serve)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Outputs:
        needed, before = ctx.needs_input_grad, ctx.leading
        if all(dout is None for dout in douts):
            return (None,) * len(needed)
        op, name = ctx.op, ctx.backend
        backward = op.backward
        recording = _grad_enabled() and not _is_compiling()
        if backward is not None and differentiated(recording):
            run = backward.formula
        elif recording:

            def run(call: Any) -> Outputs:
                return backward.record(call, name, backward.library)
        else:

            def run(call: Any) -> Outputs:
                return backward.library(call, name)

        grads = op.pull_back(douts, kept(ctx), ctx.rest, ctx.wanted, run)
        given = len(needed) - before
        return *(None,) * before, *grads[:given], *(None,) * (given - len(grads))


class _Whole(_Differentiable):
    """The same with all outputs, of which the rest have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, call: Any, backend: str, serve: Any, *tensors: Tensor | None
    ) -> Outputs:
        outputs: list[Any] = []

        def served(call: Any, backend: str) -> Outputs:
            outputs.extend(serve(call, backend))
            return tuple(outputs)

        first = _serve(ctx, 4, op, call, backend, served)
        ctx.backend = op.choose(backend, call)  # the gradient's is never "auto"
        ctx.mark_non_differentiable(*(x for x in outputs[len(first) :] if x is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Outputs:
        return _Differentiable.backward(ctx, *douts[: ctx.op.cotangents])


def public(op: Op, name: str) -> type[torch.autograd.Function]:
    """The op as a Function: apply(config, backend, *fields), the fields of its call in order.

    Fields may be left out at the end. The call is taken for one that was checked.
    """

    class Function(_Differentiable):
        @staticmethod
        def forward(  # type: ignore[override]
            ctx: Any, config: Any, backend: str, *fields: Any
        ) -> Tensor | Outputs:
            missing = (None,) * (len(op.library.call._fields) - 1 - len(fields))
            call = op.library.call(*fields, *missing, config)
            found = _serve(ctx, 2, op, call, backend, op.library)
            return found if len(found) > 1 else found[0]

    Function.__name__ = Function.__qualname__ = name
    return Function


class _ByFormula(torch.autograd.Function):
    """An op that is differentiated by its formula: apply(op, call, backend, serve, *tensors)."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, call: Any, backend: str, serve: Any, *tensors: Tensor | None
    ) -> Outputs:
        keep(ctx, *tensors)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.rest = op, call[len(tensors) :]
        return serve(call, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Outputs:
        op = ctx.op

        def formula(*tensors: Tensor | None) -> Outputs:
            return op.formula(op.library.call(*tensors, *ctx.rest))

        return None, None, None, None, *second_order(formula, kept(ctx), cotangents)


def direct(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` for calls outside torch.func's transforms.

    torch's own `apply` prepares for these on every call, which takes 2 µs; under one it raises,
    and this one is wrong. That of the backward, another 1 µs, looks whether it is called `vjp`.
    """
    apply = torch._C._FunctionBase.__dict__["apply"]
    found: Any = type(function.__name__, (function,), {"apply": apply, "__doc__": function.__doc__})
    found._backward_cls.apply = function.backward
    return found


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, and what `kept` compares where hooks may give back other tensors."""
    ctx.save_for_backward(*tensors)
    ctx.kept = _layouts(tensors) if _saving_hooks(False) is not None else None


def kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors that `keep` saved.

    Raises:
        RuntimeError: a saved-tensor hook gave back another dtype or shape.
    """
    tensors = ctx.saved_tensors
    if ctx.kept is not None and ctx.kept != (found := _layouts(tensors)):
        got, expected = next(
            pair for pair in zip(found, ctx.kept, strict=True) if pair[0] != pair[1]
        )
        raise RuntimeError(
            f"{type(ctx).__name__}: got a saved tensor (dtype, shape) {got} from a saved-tensor "
            f"hook, expected it as it was saved, {expected}"
        )
    return tensors


def _layouts(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if x is None else (x.dtype, tuple(x.shape)) for x in tensors]


def second_order(
    formula: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of Σ cotangent · output over the outputs of `formula(*inputs)`.

    One for each input that requires a gradient, else None. They are taken with respect to views of
    the inputs: these may share a history, which is for autograd to go on with and not for this.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        pairs = [
            (output, cotangent.to(output.dtype))
            for output, cotangent in zip(formula(*views), cotangents, strict=True)
            if output is not None and cotangent is not None and output.requires_grad
        ]
    chosen = [x for x in views if x is not None and x.requires_grad]
    found: Any = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            chosen,
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
        if pairs and chosen
        else [None] * len(chosen)
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
