"""SwiGLU and its kin: the product of two halves of a layer, one of them behind an activation.

Each element by itself, and the gradients from the inputs alone (Shazeer 2020):

    out = act(gate) ∘ up
    dgate = dout ∘ up ∘ act'(gate)      dup = dout ∘ act(gate)

    silu x·σ(x)    gelu x·Φ(x)    gelu_tanh x·σ(2√(2/π)·(x + 0.044715·x³))    relu max(x, 0)

Without `up` the rows of gate hold both, one after the other, and so do those of dgate.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from ..reference import functional as reference
from ._backends import standard_backends
from ._checks import HALVES, check_device, check_like, check_tensor
from ._library import LibraryOp, hand_over, has_override, is_overridden
from ._op import Op
from ._rows import views

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class SwigluConfig(NamedTuple):
    """The options of one call. activation: its place in `ACTIVATIONS`."""

    activation: int = 0


class SwigluCall(NamedTuple):
    """One checked call: gate and up (…, W), or gate (…, 2W) and no up."""

    gate: Tensor
    up: Tensor | None
    config: SwigluConfig


class SwigluBackwardCall(NamedTuple):
    """The gradient of out (…, W), with the inputs."""

    dout: Tensor
    gate: Tensor
    up: Tensor | None
    config: SwigluConfig


def prepare(gate: Tensor, up: Tensor | None, activation: str) -> SwigluCall:
    """Check everything.

    Raises:
        TypeError: not floating-point tensors, or an activation that is no string.
        ValueError: gate and up that are not alike, a gate alone that has no halves, or an
            activation that is not known.
    """
    shape = check_tensor("swiglu", "gate", gate)
    if up is None:
        if not shape or shape[-1] % 2 != 0:
            raise ValueError(
                f"swiglu: got gate of shape {tuple(shape)} without up, expected (…, 2·W), gate and "
                "up one after the other"
            )
    else:
        shape_of_up = check_tensor("swiglu", "up", up)
        check_device("swiglu", "up", up, "gate", gate)
        if shape_of_up != shape or up.dtype != gate.dtype:
            raise ValueError(
                f"swiglu: got gate {tuple(shape)} {gate.dtype} and up {tuple(shape_of_up)} "
                f"{up.dtype}, expected one shape and one dtype"
            )
    return SwigluCall(gate, up, configure("swiglu", activation))


def configure(name: str, activation: str) -> SwigluConfig:
    """Check the activation of the function or module of that name."""
    if not isinstance(activation, str):
        raise TypeError(
            f"{name}: got activation of type {type(activation).__name__}, expected a str"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: got activation={activation!r}, expected one of {ACTIVATIONS}")
    return SwigluConfig(ACTIVATIONS.index(activation))


# --- formulas ------------------------------------------------------------------------------------


def _wide(x: Any) -> Any:
    """Half precision computes in float32, as the kernels do."""
    return x.float() if x is not None and x.dtype in HALVES else x


def _formula(call: SwigluCall) -> tuple[Tensor]:
    """The reference, differentiable to any order."""
    gate, up, config = call
    out = reference.swiglu(_wide(gate), _wide(up), activation=ACTIVATIONS[config.activation])
    return (out.to(gate.dtype),)


def _backward_formula(call: SwigluBackwardCall) -> tuple[Tensor, Tensor | None]:
    *tensors, config = call
    given = (_wide(x) for x in tensors)
    return reference.swiglu_backward(*given, activation=ACTIVATIONS[config.activation])


# --- backends: forward(call, out), backward(call, dgate, dup) ------------------------------------


def _triton_kernels() -> Any:
    from ..kernels.swiglu import swiglu_backward, swiglu_forward

    return SimpleNamespace(forward=swiglu_forward, backward=swiglu_backward, any_rank=False)


def _reference_kernels() -> Any:
    def dense(call: Any) -> Any:
        """Torch computes by other functions where strides are others."""
        return type(call)(*(None if x is None else x.contiguous() for x in call[:-1]), call[-1])

    def forward(call: SwigluCall, out: Tensor) -> None:
        out.copy_(_formula(dense(call))[0])

    def backward(call: SwigluBackwardCall, *grads: Tensor | None) -> None:
        for grad, found in zip(grads, _backward_formula(dense(call)), strict=True):
            if grad is not None and found is not None:
                grad.copy_(found)

    return SimpleNamespace(forward=forward, backward=backward, any_rank=True)


BACKENDS = standard_backends("swiglu", lambda call: call.gate, _triton_kernels, _reference_kernels)

# --- what runs -----------------------------------------------------------------------------------


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as tensors (…, W)."""
    return gate.chunk(2, -1) if up is None else (gate, up)  # type: ignore[return-value]


def _lies_apart(x: Tensor | None) -> bool:
    """Whether the elements of a row do not lie side by side."""
    return x is not None and not x.is_contiguous() and x.stride(-1) != 1


def _along_rows(call: Any) -> Any:
    """The call, with copies of tensors whose elements lie apart."""
    tensors = call[:-1]
    for x in tensors:
        if _lies_apart(x):
            return type(call)(*(x.contiguous() if _lies_apart(x) else x for x in tensors), call[-1])
    return call


def _empty_output(call: SwigluCall) -> tuple[Tensor]:
    gate, up, _ = call
    if up is not None:
        return (gate.new_empty(gate.shape),)
    return (gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2)),)


def _empty_gradients(call: SwigluBackwardCall) -> tuple[Tensor, Tensor | None]:
    gate, up = call.gate, call.up
    return gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)


def _run_forward(call: SwigluCall, kernels: Any) -> tuple[Tensor]:
    (out,) = _empty_output(call)
    if out.numel() == 0:
        return (out,)
    call = _along_rows(call)
    if kernels.any_rank and out.dim() <= 4:
        kernels.forward(call, out)
    else:
        for o, g, u in views((out, *halves(call.gate, call.up)), -1, 0):
            kernels.forward(SwigluCall(g, u, call.config), o)
    return (out,)


def _run_backward(call: SwigluBackwardCall, kernels: Any) -> tuple[Tensor, Tensor | None]:
    dgate, dup = _empty_gradients(call)
    if dgate.numel() == 0:
        return dgate, dup
    call = _along_rows(call)
    if kernels.any_rank and call.dout.dim() <= 4:
        kernels.backward(call, dgate, dup)
    else:
        dout, gate, up, config = call
        given = (dout, *halves(gate, up), *halves(dgate, dup))
        for d, g, u, dg, du in views(given, -1, 0):
            kernels.backward(SwigluBackwardCall(d, g, u, config), dg, du)
    return dgate, dup


# --- library ops ---------------------------------------------------------------------------------


def _check_call(call: SwigluCall) -> SwigluCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    gate, up, (activation,) = call
    if activation not in range(len(ACTIVATIONS)):
        raise ValueError(
            f"swiglu: got activation={activation}, expected 0 to {len(ACTIVATIONS) - 1}"
        )
    return prepare(gate, up, ACTIVATIONS[activation])


def _check_backward_call(call: SwigluBackwardCall) -> SwigluBackwardCall:
    """The same for a call of the backward."""
    checked = _check_call(SwigluCall(*call[1:]))
    gate, shape = checked.gate, _empty_output(checked)[0].shape
    check_like("swiglu_bwd", "dout", call.dout, shape, gate.dtype, gate.device)
    return call


swiglu_fwd = LibraryOp(
    "swiglu_fwd", SwigluCall, ("out",),
    allocate=_empty_output, run=_run_forward, check=_check_call,
)  # fmt: skip
swiglu_bwd = LibraryOp(
    "swiglu_bwd", SwigluBackwardCall, ("dgate", "dup"),
    allocate=_empty_gradients, run=_run_backward, check=_check_backward_call,
    wanted=lambda call: (True, call.up is not None),
)  # fmt: skip

# --- autograd ------------------------------------------------------------------------------------


def _keep(
    call: SwigluCall, outputs: Any, wanted: Any
) -> tuple[tuple[Tensor, Tensor | None], tuple[SwigluConfig]]:
    return call[:2], call[2:]


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> tuple[Any, ...]:
    return run(SwigluBackwardCall(*douts, *saved, *rest))


op = Op(
    "swiglu", BACKENDS, swiglu_fwd, _formula, differentiable=(0, 1), cotangents=1,
    backward=Op("swiglu_bwd", BACKENDS, swiglu_bwd, _backward_formula),
    keep=_keep, pull_back=_pull_back,
)  # fmt: skip

# --- public function -----------------------------------------------------------------------------


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """act(gate) ∘ up in one pass: what stands between the layers of a gated feed-forward network.

    Computed in float32 (float64 for float64) whatever the dtype and rounded once; autocast changes
    nothing. The gradients of gate and up are one pass as well, from gate and up alone.
    Differentiable to any order.

    Args:
        gate: (…, W), float16, bfloat16, float32 or float64; (…, 2·W) without up.
        up: like gate. Without one a row of gate holds both, gate and then up, as one projection
            of twice the width gives them; the gradient then is one tensor too, written in place.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, by the error function), "gelu_tanh" (its
            approximation by tanh) or "relu" (ReGLU).
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        (…, W) in the dtype of gate, contiguous. Rows may lie apart; a tensor whose columns do is
        copied first. NaN and infinities do as in `F.silu(gate) * up`: a gate of −inf gives NaN,
        but for relu.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.

    >>> import torch, fusedattn
    >>> x, both = torch.randn(4, 16, 64), torch.nn.Linear(64, 2 * 172, bias=False)
    >>> fusedattn.swiglu(both(x)).shape
    torch.Size([4, 16, 172])
    """
    if has_override(gate, up) and is_overridden(locals()):
        return hand_over(swiglu, locals())
    return op(prepare(gate, up, activation), backend)[0]
