"""`fusedattn.patch(model)`: all that a live model has of ours, in one call, and back.

A class says little of what it computes: transformers has some 300 norms and half as many gated
networks, written out one by one. So each is recognised by its results: a copy of the module, with
small random weights, is run beside each op of ours that it might be, and is changed where one of
them agrees to the rounding of fp32. Modules stay the same objects; a `forward` of their own stands
before that of the class.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..biases import t5
from ..nn.replacement import replace
from ..ops._checks import HALVES
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ..ops.rotary import apply_rotary_qk
from ..ops.swiglu import ACTIVATIONS, swiglu
from .transformers import NAME, register

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps")
_GATED = (
    ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "", "down_proj"),
    ("wi_0", "wi_1", "wo"),
)  # fmt: skip
_ROTARY = "apply_rotary_pos_emb"
_BIAS, _TABLE = "compute_bias", "relative_attention_bias"


class Patch(Mapping[str, str]):
    """What `patch` changed: a mapping of module names to what they run now.

    `left` says the same of what looked alike and was not changed, and why. `undo()` takes all back;
    as a context manager it does so on exit.
    """

    def __init__(self) -> None:
        self.left: dict[str, str] = {}
        self._changed: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """The model as it was; a `forward` that somebody has put over ours stays."""
        while self._undo:
            self._undo.pop()()

    def _note(self, name: str, what: str, undo: Callable[[], None] | None = None) -> None:
        self._changed[name] = f"{self._changed[name]}, {what}" if name in self._changed else what
        if undo is not None:
            self._undo.append(undo)

    def _bind(
        self, name: str, module: nn.Module, function: Any, what: str, method: str = "forward"
    ) -> None:
        """`function(module, …)` in place of a method of the class."""
        bound = types.MethodType(function, module)
        setattr(module, method, bound)

        def undo() -> None:
            if vars(module).get(method) is bound:
                delattr(module, method)

        self._note(name, what, undo)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __getitem__(self, name: str) -> str:
        return self._changed[name]

    def __len__(self) -> int:
        return len(self._changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._changed)

    def __repr__(self) -> str:
        lines = [f"Patch of {len(self)} modules"]
        left = {name: f"left, {why}" for name, why in self.left.items()}
        for name, what in (*self.items(), *left.items()):
            lines.append(f"  {name or '(the model itself)'}: {what}")
        return "\n".join(lines)


def patch(model: nn.Module) -> Patch:
    """Make attention, norms, rotary embeddings and gated networks of `model` ours, in place.

    What `fusedattn.replace` swaps; the attention of a transformers model, if it calls the interface
    (`integrations.transformers.register`), and there T5's relative biases; every module that
    computes a layer norm, an RMS norm (of weights that are stored less 1, too) or a gated network
    of silu, gelu or relu, with its dropout, whatever its class; and transformers' rotary embedding.
    Parameters, buffers, hooks and names stay. A norm's result has the dtype of its input, also
    where float32 weights would widen it.

    A deep copy is patched too. A model that is to be pickled whole must be turned back first.

    Returns:
        What was changed, by module name, and in `left` what was not; its `undo()` takes it back.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.

    >>> import torch, fusedattn
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> fusedattn.patch(model)
    Patch of 1 modules
      1: fusedattn.nn.LayerNorm
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: got model of type {type(model).__name__}, expected a Module")
    done = Patch()
    swapped = replace(model)
    done._undo.append(swapped.undo)
    for name, (_, new) in swapped.items():
        done._note(name, f"fusedattn.nn.{new.__name__}")
    _attention(done, model)
    with torch.random.fork_rng(devices=()):
        for name, module in model.named_modules():
            _one(done, name, module)
    return done


def _one(done: Patch, name: str, module: nn.Module) -> None:
    if "forward" in vars(module) or type(module).__module__.startswith("fusedattn."):
        return
    if any("norm" in kind.__name__.lower() for kind in type(module).__mro__):
        _norm(done, name, module)
    elif (names := _gated_names(module)) is not None:
        _gated(done, name, module, names)
    elif isinstance(getattr(module, _TABLE, None), nn.Embedding) and hasattr(module, _BIAS):
        _distances(done, name, module)
    elif _ROTARY in getattr(_innermost(module), "co_names", ()):
        _rotary(done, name, module)


# --- attention -----------------------------------------------------------------------------------


def _attention(done: Patch, model: nn.Module) -> None:
    transformers: Any = sys.modules.get("transformers")  # else no model of its is there
    if transformers is None or not hasattr(transformers, "PreTrainedModel"):
        return
    for name, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel):
            continue
        before = [(x.config, x.config._attn_implementation) for x in _models(module, transformers)]
        if all(asked == NAME for _, asked in before):
            continue
        register()

        def undo(before: Any = before) -> None:
            for config, asked in before:
                config._attn_implementation_internal = asked

        try:
            module.set_attn_implementation(NAME)
        except ValueError as error:
            undo()
            done.left[name] = str(error)
        else:
            done._note(name, f"attn_implementation={NAME!r}", undo)


def _models(model: Any, transformers: Any) -> list[Any]:
    return [x for x in model.modules() if isinstance(x, transformers.PreTrainedModel)]


# --- norms ---------------------------------------------------------------------------------------


def _rms_norm(module: Any, x: Tensor) -> Any:
    return rms_norm(x, module.weight.shape, module.weight, _eps(module))


def _rms_norm_1(module: Any, x: Tensor) -> Any:
    return rms_norm(x, module.weight.shape, module.weight, _eps(module), weight_offset=1.0)


def _layer_norm(module: Any, x: Tensor) -> Any:
    bias = getattr(module, "bias", None)
    return layer_norm(x, module.weight.shape, module.weight, bias, _eps(module))


def _rms_norm_bare(module: Any, x: Tensor) -> Any:
    return rms_norm(x, x.shape[-1], None, _eps(module))


_NORMS = {
    "fusedattn.rms_norm": _rms_norm,
    "fusedattn.rms_norm of 1 + weight": _rms_norm_1,
    "fusedattn.layer_norm": _layer_norm,
}


def _norm_forward(norm: Callable[..., Any], narrow: bool) -> Any:
    """narrow: half weights make half results, whatever comes in, as in T5."""

    def forward(self: Any, x: Tensor, *rest: Any, **further: Any) -> Any:
        if rest or further:  # a gate, say
            return type(self).forward(self, x, *rest, **further)
        out = norm(self, x)
        return out.to(self.weight.dtype) if narrow and self.weight.dtype in HALVES else out

    return forward


def _eps(module: Any) -> float:
    return next(float(getattr(module, x)) for x in _EPS if hasattr(module, x))


def _norm(done: Patch, name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if next(module.children(), None) is not None:
        return
    if not any(isinstance(getattr(module, x, None), float) for x in _EPS):
        done.left[name] = f"{type(module).__name__} has no eps"
        return
    if weight is None and next(module.parameters(), None) is None:
        shape, candidates = (
            torch.Size((16,)),
            {"fusedattn.rms_norm without a weight": _rms_norm_bare},
        )
    elif isinstance(weight, Tensor):
        shape, candidates = weight.shape, _NORMS
    else:
        return
    probe, found = copy.deepcopy(module), None
    if not any(x.is_meta for x in module.parameters()):
        probe.to("cpu", torch.float32)
        for each in probe.parameters():
            each.data = torch.randn(each.shape)
        source = torch.Generator().manual_seed(0)
        # A small input shows where eps stands, one off the middle whether the mean is taken away.
        inputs = [
            torch.randn((2, 3, *shape), generator=source) * s + s / 2 for s in (1e-3, 1.0, 1e2)
        ]
        found = _agrees(probe, candidates, inputs)
    if found is None:
        done.left[name] = f"{type(module).__name__} computes something else"
        return
    narrow = weight is not None and _narrows(probe, inputs[0])
    done._bind(name, module, _norm_forward(candidates[found], narrow), found)


def _narrows(probe: Any, x: Tensor) -> bool:
    """Whether half weights make a half result of a float32 input."""
    try:
        with torch.no_grad():
            return probe.bfloat16()(x).dtype == torch.bfloat16
    except Exception:  # it takes one dtype
        return False


def _agrees(
    probe: nn.Module, candidates: Mapping[Any, Any], inputs: list[Tensor], training: bool = False
) -> Any:
    """The candidate that gives what the module gives for these inputs."""
    try:
        with torch.no_grad():
            want = [probe.train(training)(x) for x in inputs]
            for what, forward in candidates.items():
                pairs = [(forward(probe, x), y) for x, y in zip(inputs, want, strict=True)]
                if all(isinstance(y, Tensor) and _same(x, y) for x, y in pairs):
                    return what
    except Exception:  # whatever a module of somebody else's may do with arguments it does not know
        return None
    return None


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-5, atol=1e-5)


# --- gated networks ------------------------------------------------------------------------------


class _Gated(NamedTuple):
    """What a network computes; `inner` and `outer` are its dropouts, before and after `down`."""

    activation: str
    inner: str = ""
    outer: str = ""


def _gated_forward(found: _Gated, names: tuple[str, str, str]) -> Any:
    gate, up, down = names

    def forward(self: Any, x: Tensor) -> Tensor:
        both = getattr(self, gate)(x), getattr(self, up)(x) if up else None
        out: Tensor = swiglu(*both, activation=found.activation)
        if found.inner:
            out = getattr(self, found.inner)(out)
        last = getattr(self, down)
        out = last(_widened(out, getattr(last, "weight", None)))
        return getattr(self, found.outer)(out) if found.outer else out

    return forward


def _widened(x: Tensor, weight: Any) -> Tensor:
    """In float32 for weights that T5 keeps so among halves; autocast sees to that itself."""
    wide = isinstance(weight, Tensor) and weight.dtype == torch.float32 and x.dtype in HALVES
    return x.float() if wide and not torch.is_autocast_enabled(x.device.type) else x


def _gated_names(module: nn.Module) -> tuple[str, str, str] | None:
    """What its layers are called: gate, up or "" where gate holds both, and down."""
    layers = {name for name, x in module.named_children() if next(x.parameters(), None) is not None}
    return next((names for names in _GATED if layers == {x for x in names if x}), None)


def _gated(done: Patch, name: str, module: nn.Module, names: tuple[str, str, str]) -> None:
    probe, drops = copy.copy(module), [""]
    probe._modules = {n: x for n, x in module._modules.items() if n in names}
    probe._forward_hooks = type(module._forward_hooks)()
    probe._forward_pre_hooks = type(module._forward_pre_hooks)()
    gate, up, down = names
    source = torch.Generator().manual_seed(0)
    for layer, shape in ((gate, (8, 12 if up else 24)), (up, (8, 12)), (down, (12, 8))):
        if layer:
            small = nn.Linear(*shape)
            for x in small.parameters():
                x.data = torch.randn(x.shape, generator=source)
            probe._modules[layer] = small
    for layer, child in module._modules.items():
        if isinstance(child, nn.Dropout):  # something in its place that shows where it stands
            probe._modules[layer] = nn.Tanh()
            drops.append(layer)
        elif layer not in names:
            probe._modules[layer] = copy.deepcopy(child)
    kinds = [_Gated(x, a, b) for x in ACTIVATIONS for a in drops for b in drops if not a or a != b]
    candidates = {x: _gated_forward(x, names) for x in kinds}
    inputs = [torch.randn(2, 3, 8, generator=source)]
    found = _agrees(probe, candidates, inputs)
    if found is None:
        done.left[name] = f"{type(module).__name__} computes something else than a gated network"
    elif _agrees(probe, {found: candidates[found]}, inputs, training=True) is None:
        done.left[name] = f"{type(module).__name__} computes something else in training"
    else:
        what = f"fusedattn.swiglu of {found.activation}"
        done._bind(name, module, candidates[found], what)


# --- relative biases -----------------------------------------------------------------------------


def _distance_bias(bidirectional: bool) -> Any:
    """T5's `compute_bias` by rule, for `attention_forward`, which the layers hand it on to."""

    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
    ) -> Any:
        table = getattr(self, _TABLE)
        last = isinstance(past_seen_tokens, int) and past_seen_tokens + query_length == key_length
        if not last or self.config._attn_implementation != NAME or table._forward_hooks:
            return getattr(type(self), _BIAS)(
                self, query_length, key_length, device, past_seen_tokens
            )
        furthest = self.relative_attention_max_distance
        return t5(table.weight, bidirectional=bidirectional, max_distance=furthest)

    return compute_bias


def _distances(done: Patch, name: str, module: Any) -> None:
    """Tried in a forward pass that is long enough for all buckets."""
    if getattr(getattr(module, "config", None), "_attn_implementation", None) != NAME:
        return
    if any(x.is_meta for x in module.parameters()):
        done.left[name] = f"{type(module).__name__} has no weights to be tried with"
        return
    probe = copy.deepcopy(module).to("cpu", torch.float32)
    source, table = torch.Generator().manual_seed(0), getattr(probe, _TABLE).weight
    table.data = torch.randn(table.shape, generator=source)
    length = 2 * int(getattr(module, "relative_attention_max_distance", 128))
    x = torch.randn(1, length, module.config.hidden_size, generator=source)

    found = None
    try:
        with torch.no_grad():
            want = probe.eval()(x)[0]
            for bidirectional in (True, False):
                probe.compute_bias = types.MethodType(_distance_bias(bidirectional), probe)
                if found is None and _same(probe(x)[0], want):
                    found = bidirectional
    except Exception:  # other arguments, or one that does something with the bias
        found = None
    if found is None:
        done.left[name] = f"{_BIAS} of {type(module).__name__} computes something else"
    else:
        done._bind(name, module, _distance_bias(found), "fusedattn.biases.t5", _BIAS)


# --- rotary embeddings ---------------------------------------------------------------------------


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' tables (B or 1, S, R), each half the same, as ours."""
    cos, sin = (x[..., : x.shape[-1] // 2] for x in (cos, sin))
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return apply_rotary_qk(q, k, cos, sin)


def _rotary(done: Patch, name: str, module: nn.Module) -> None:
    """Its `forward` with ours under the name that it looks up among its file's."""
    theirs = type(module).forward
    given = inspect.unwrap(theirs).__globals__.get(_ROTARY)
    source = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=source), torch.randn(2, 1, 5, 8, generator=source)
    angles = torch.randn(2, 5, 4, generator=source).repeat(1, 1, 2)
    try:
        want, got = (f(q, k, angles.cos(), angles.sin()) for f in (given, _rotate))
        same = all(_same(x, y) for x, y in zip(got, want, strict=True))
    except Exception:  # another signature
        same = False

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **further: Any) -> Any:
        plain = not rest and not further and cos.dim() == 3 and q.dim() == 4
        return _rotate(q, k, cos, sin) if plain else given(q, k, cos, sin, *rest, **further)

    forward = _looking_up(theirs, {_ROTARY: ours}) if same else None
    if forward is None:
        done.left[name] = f"{_ROTARY} of {type(module).__module__} computes something else"
    else:
        done._bind(name, module, forward, "fusedattn.apply_rotary_qk")


def _innermost(module: nn.Module) -> Any:
    """The code of its class's `forward`, without decorators."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _looking_up(function: Any, names: dict[str, Any]) -> Any:
    """A copy of `function`, in which these global names stand for something else.

    Of what decorates it copies too, each of which holds the next; None where one hides it.
    """
    inner = getattr(function, "__wrapped__", None)
    cells, scope = function.__closure__, function.__globals__
    if inner is None:
        scope = scope | names
    else:
        changed = _looking_up(inner, names)
        if changed is None or not any(x.cell_contents is inner for x in cells or ()):
            return None
        cells = tuple(
            types.CellType(changed) if x.cell_contents is inner else x for x in cells or ()
        )
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
