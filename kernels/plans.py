"""Launch plans: what a launcher did for some tensors is done again for others like them.

Before a launch reaches the driver, Triton binds and specialises every argument and looks the kernel
up by all of them, which takes longer than many a kernel runs; and the launcher computes tile and
grid anew. All of that depends on shapes, strides, dtypes, alignments and options alone. So a
launcher launches through a `Launches`, which writes down each step, and from the second call of its
kind on the steps are repeated with the addresses of the new tensors.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .common import INTERPRETED, with_data
from .tuning import Tuner, is_warming

# Of every launch: a·b + c rounds once. Triton's default is a setting of the process, and changes.
FMA = {"enable_fp_fusion": True}
_RUNTIME = triton.knobs.runtime
MOST = 1024  # plans of a launcher, of which the oldest goes first

Step = Callable[[list[Tensor], list[Any], int], None]  # tensors, their handles, stream
Rebuild = Callable[[list[Any]], Any]  # from the handles


def _handle(x: Tensor) -> Any:
    """As what a kernel gets a tensor: its address, but for the interpreter, which reads dtypes."""
    return x if INTERPRETED.value else x.data_ptr()


def _rebuild(argument: Any, slots: dict[int, int]) -> Rebuild | None:
    """Makes an argument anew with other tensors; None for one that has none in it."""
    if isinstance(argument, Tensor):
        return operator.itemgetter(slots[id(argument)])
    if not isinstance(argument, tuple):
        return None
    # The driver wants tuples in tuples, the interpreter the names of their fields.
    make = getattr(argument, "_make", tuple) if INTERPRETED.value else tuple
    parts = [_rebuild(x, slots) for x in argument]
    if all(x is None for x in parts):
        return None
    pairs = list(zip(argument, parts, strict=True))
    return lambda handles: make([x if part is None else part(handles) for x, part in pairs])


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel's programs write their tensor descriptors: memory of torch's."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _with_scratch(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function(...)` with `_scratch` as Triton's allocator, which for everybody else stays.

    Triton keeps its allocator in a context variable.
    """

    def inside() -> Any:
        triton.set_allocator(_scratch)
        return function(*args, **options)

    return contextvars.copy_context().run(inside)


def _is_view(argument: tuple[Any, ...]) -> bool:
    """A tensor and numbers, as most arguments are."""
    first, *rest = argument
    return isinstance(first, Tensor) and not any(isinstance(x, Tensor | tuple) for x in rest)


class Launches:
    """What a launcher does with tensors: done at once, and written down to be repeated.

    A launcher may look at all that `_described` puts in the key, and at nothing else of a tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)  # kept, so that no two have the same id
        self._slots = {id(x): slot for slot, x in enumerate(tensors)}
        self._steps: list[Step] | None = []

    def steps(self) -> list[Step] | None:
        """All steps; None where they cannot be repeated."""
        return self._steps

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """`kernel[grid](*args, **options)`."""
        options = FMA | options
        compiled = _with_scratch(kernel[grid], *args, **options)
        names = inspect.signature(kernel.fn).parameters
        given = dict(zip(names, args, strict=False)) | options
        arguments = [given.get(name, parameter.default) for name, parameter in names.items()]
        options = {name: options[name] for name in options.keys() - names.keys()}
        self._write(self._launch_step(kernel, compiled, grid, arguments, options))

    def tuned(
        self,
        tuner: Tuner,
        about: dict[str, Any],
        kernel: Any,
        grid: Callable[[dict[str, int]], tuple[int, ...]],
        *args: Any,
        zeroed: Tensor | None = None,
        made: dict[str, Callable[[Launches, dict[str, int]], Any] | None] | None = None,
        **arguments: Any,
    ) -> None:
        """`launch` with what the tuner picks; about: what it asks, grid: from the tile.

        zeroed: an output that has to be zero before, which launches that are timed leave it not.
        made: arguments that depend on the tile, which other launches may make; None stays None.
        """

        def options(launches: Launches, config: triton.Config) -> dict[str, Any]:
            more = {x: make and make(launches, config.kwargs) for x, make in (made or {}).items()}
            return arguments | more | config.all_kwargs()

        def trial(config: triton.Config) -> None:
            aside = Launches(self._tensors)  # what is not picked is not written down
            run = kernel[grid(config.kwargs)]
            _with_scratch(run, *args, **FMA, **options(aside, config))

        config = tuner.pick(launch=trial, **about)
        if zeroed is not None:
            self.apply(Tensor.zero_, zeroed)
        self.launch(kernel, grid(config.kwargs), *args, **options(self, config))

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for the steps that follow."""
        return self._make(torch.empty, tuple(shape), dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._make(torch.zeros, tuple(shape), dtype)

    def empties(
        self, count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """So many of one shape, by one allocation; each begins at a multiple of 16 bytes."""
        size = math.prod(shape)
        step = triton.cdiv(size, 16) * 16

        def pieces(memory: Tensor) -> list[Tensor]:
            return [memory[i * step :][:size].view(shape) for i in range(count)]

        def make(tensors: list[Tensor], handles: list[Any], stream: int) -> None:
            memory = torch.empty(count * step, dtype=dtype, device=tensors[0].device)
            if INTERPRETED.value:
                handles += pieces(memory)
            else:
                begin = memory.data_ptr()
                handles += [begin + i * step * dtype.itemsize for i in range(count)]
            tensors += [memory] * count

        self._write(make)
        memory = torch.empty(count * step, dtype=dtype, device=self._tensors[0].device)
        return [self._new(x) for x in pieces(memory)]

    def vector(self, x: Tensor | None) -> Tensor | None:
        """What a kernel reads in the order of its elements, whatever its strides are."""
        if x is None or x.is_contiguous():
            return None if x is None else with_data(x)
        slot = self._slots[id(x)]

        def copy(tensors: list[Tensor], handles: list[Any], stream: int) -> None:
            tensors.append(tensors[slot].contiguous())
            handles.append(_handle(tensors[-1]))

        self._write(copy)
        return self._new(x.contiguous())

    def apply(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        """`function(*tensors)`, which writes to one of them; none is of `empties`."""
        function(*tensors)
        slots = [self._slots[id(x)] for x in tensors]
        self._write(lambda tensors, handles, stream: function(*(tensors[slot] for slot in slots)))

    def _make(self, function: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        def make(tensors: list[Tensor], handles: list[Any], stream: int) -> None:
            tensors.append(function(shape, dtype=dtype, device=tensors[0].device))
            handles.append(_handle(tensors[-1]))

        self._write(make)
        return self._new(function(shape, dtype=dtype, device=self._tensors[0].device))

    def _new(self, x: Tensor) -> Tensor:
        self._slots[id(x)] = len(self._tensors)
        self._tensors.append(x)
        return x

    def _write(self, step: Step | None) -> None:
        if step is None:
            self._steps = None
        elif self._steps is not None:
            self._steps.append(step)

    def _launch_step(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: list[Any],
        options: dict[str, Any],
    ) -> Step | None:
        """A launch with all arguments in the order of the kernel's."""
        slots = self._slots
        parts = [_rebuild(x, slots) for x in arguments]
        moving = [(at, part) for at, part in enumerate(parts) if part is not None]
        fixed = [x if part is None else None for x, part in zip(arguments, parts, strict=True)]
        if INTERPRETED.value:
            run = kernel[grid]

            def interpret(tensors: list[Tensor], handles: list[Any], stream: int) -> None:
                given = fixed.copy()
                for at, part in moving:
                    given[at] = part(handles)
                run(*given, **options)

            return interpret
        if compiled is None:  # a hook of Triton's kept it from being compiled
            return None
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        if getattr(compiled.metadata, "global_scratch_size", 0):
            run = functools.partial(_with_scratch, run)
        x, y, z = (*grid, 1, 1)[:3]
        views = []
        for at, argument in enumerate(arguments):
            if isinstance(argument, tuple) and _is_view(argument):
                views.append((at, slots[id(argument[0])], argument[1:]))
        seen = {at for at, *_ in views}
        moving = [(at, part) for at, part in moving if at not in seen]

        def launch(tensors: list[Tensor], handles: list[Any], stream: int) -> None:
            given = fixed.copy()
            for at, slot, rest in views:
                given[at] = (handles[slot], *rest)
            for at, part in moving:
                given[at] = part(handles)
            run(x, y, z, stream, function, metadata, None, None, None, *given)

        return launch


class _Types(dict):  # type: ignore[type-arg]
    """Whether a type is that of a tensor. `isinstance` takes longer, for what is none above all."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, Tensor)
        return self[kind]


_IS_TENSOR = _Types()


def _described(given: Sequence[Any]) -> tuple[list[Tensor], list[int], tuple[Hashable, ...] | None]:
    """The tensors, their addresses and what a plan depends on; None for what gets no plan."""
    tensors: list[Tensor] = []
    addresses: list[int] = []
    key: list[Hashable] = []
    bits = 0
    for x in given:
        if not _IS_TENSOR[type(x)]:
            key.append(x)
            continue
        address = x.data_ptr()
        if address >> 40 == 0:  # perhaps freed: see `with_data`
            return tensors, addresses, None
        bits |= address
        tensors.append(x)
        addresses.append(address)
        # Strides along which there is one element may be any in memory that is contiguous.
        key += (x.dtype, x.shape, x.is_contiguous() or x.stride())
    if bits & 15:
        key.append(tuple(x & 15 == 0 for x in addresses))
    if len(set(addresses)) < len(addresses):
        key.append(tuple(addresses.index(x) for x in addresses))
    key.append(tensors[0].get_device())
    return tensors, addresses, tuple(key)


def _calls(hook: Any) -> bool:
    """Whether a hook of Triton's, or a chain of them, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _repeat(steps: list[Step], tensors: list[Tensor], addresses: list[int]) -> None:
    if INTERPRETED.value:
        _run(steps, tensors, list(tensors), 0)
        return
    driver = triton.runtime.driver.active
    device = tensors[0].get_device()
    current = driver.get_current_device()
    if device in (-1, current):  # -1: a CPU tensor
        _run(steps, tensors, addresses, driver.get_current_stream(current))
        return
    with torch.cuda.device(device):
        _run(steps, tensors, addresses, driver.get_current_stream(device))


def _run(steps: list[Step], tensors: list[Tensor], handles: list[Any], stream: int) -> None:
    for step in steps:
        step(tensors, handles, stream)


def planned(settings: Callable[[Any], Hashable] | None = None) -> Callable[[Callable], Callable]:
    """Makes of `launcher(launches, call, *outputs)` a function of call and outputs, with plans.

    The first tensor's device is the current one meanwhile. settings(call): what the launcher
    depends on besides its arguments.
    """

    def decorate(launcher: Callable[..., None]) -> Callable[..., None]:
        plans: dict[Hashable, list[Step]] = {}
        lock = threading.Lock()

        def key_of(call: Any, key: tuple[Hashable, ...]) -> Hashable:
            return key if settings is None else (settings(call), key)

        def record(call: Any, outputs: Any, tensors: list[Tensor], key: Any) -> None:
            launches = Launches(tensors)
            launcher(launches, call, *outputs)
            steps = launches.steps()
            if key is not None and steps is not None:
                with lock:
                    while len(plans) >= MOST:
                        del plans[next(iter(plans))]
                    plans[key_of(call, key)] = steps  # what was timed meanwhile is in the settings

        @functools.wraps(launcher)
        def launch(call: Any, *outputs: Tensor | None) -> None:
            given = (*call, *outputs)
            tensors, addresses, key = _described(given)
            # A profiler wants to know of each launch what only Triton's own tells it.
            watched = _calls(_RUNTIME.launch_enter_hook) or _calls(_RUNTIME.launch_exit_hook)
            steps = None
            if key is not None and not watched and not is_warming():
                steps = plans.get(key if settings is None else (settings(call), key))
            if steps is None:
                tensors = [x for x in given if isinstance(x, Tensor)]
                with torch.cuda.device_of(tensors[0]):
                    record(call, outputs, tensors, key)
            else:
                _repeat(steps, tensors, addresses)

        launch.plans = plans  # type: ignore[attr-defined]
        return launch

    return decorate
