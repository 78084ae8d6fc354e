"""kernels/plans.py: a launch that is repeated gives what a fresh one gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import device_for
from fusedattn.ops.attention_config import AttentionBackwardCall, AttentionCall, AttentionConfig
from fusedattn.ops.norm_config import NormBackwardCall, NormConfig
from fusedattn.ops.rotary_config import RotaryCall, RotaryConfig
from processes import in_a_new_process
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

from fusedattn.kernels import plans, tuning  # noqa: E402
from fusedattn.kernels.attention_bwd import attention_backward  # noqa: E402
from fusedattn.kernels.attention_fwd import attention_forward  # noqa: E402
from fusedattn.kernels.norm_bwd import norm_backward  # noqa: E402
from fusedattn.kernels.rotary import rotary_forward  # noqa: E402

DEVICE = device_for("triton")

# --- what is repeated is right -------------------------------------------------------------------


def repeated(launcher: Any, call_of: Callable[[], tuple[Any, ...]]) -> None:
    """Two calls of a kind on other tensors, the second by a plan, and anew: the same bits."""
    launcher.plans.clear()
    launcher(*call_of())
    (steps,) = launcher.plans.values()
    given = call_of()
    launcher(*given)
    assert list(launcher.plans.values()) == [steps]
    found = [None if x is None else x.clone() for x in given[1:]]
    launcher.plans.clear()
    for x in given[1:]:
        if x is not None:
            x.fill_(float("nan"))
    launcher(*given)
    for one, other in zip(found, given[1:], strict=True):
        assert one is None or torch.equal(one, other)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def attention_call(dtype: torch.dtype = torch.float32, dout: bool = True) -> tuple[Any, ...]:
    """A backward with a bias shared by the batch, and lengths that lie apart in memory."""
    q, k, v, out, dq, dk, dv = (random(2, 2, 20, 8, dtype=dtype) for _ in range(7))
    bias, lse = random(1, 2, 20, 20), random(2, 2, 20)
    lengths = torch.randint(1, 20, (4,), device=DEVICE)[::2]
    config = AttentionConfig(2, 0.3)
    call = AttentionCall(q, k, v, None, bias, lengths, config=config)
    attention_forward(call, out, lse)
    gradient = random(2, 2, 20, 8, dtype=dtype) if dout else None
    dlse = random(20, 2, 2).permute(2, 1, 0)
    backward = AttentionBackwardCall(gradient, dlse, out, lse, *call[:-1], config=config)
    return backward, dq, dk, dv, torch.empty_like(bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dout", [True, False], ids=["dout", "dlse alone"])
def test_attention_backward(dtype: torch.dtype, dout: bool) -> None:
    repeated(attention_backward, lambda: attention_call(dtype, dout))


def test_attention_forward() -> None:
    def call() -> tuple[Any, ...]:
        backward, dq, *_ = attention_call()
        forward = AttentionCall(*backward[4:10], config=backward.config)
        return forward, dq, torch.empty_like(backward.lse)

    repeated(attention_forward, call)


@pytest.mark.parametrize("width", [70, 20_001])
def test_norm_backward(width: int) -> None:
    def call() -> tuple[Any, ...]:
        dout, z, dx = (random(3, width) for _ in range(3))
        weight = random(width, 2)[:, 0]
        mean, rstd = random(3), random(3).abs()
        config = NormConfig(True, 1e-5, 0.0, 0.0)
        dtypes = z.dtype, None, z.dtype, None
        backward = NormBackwardCall(dout, None, z, weight, mean, rstd, None, 1, *dtypes, config)
        return backward, dx, None, random(width), random(width)

    repeated(norm_backward, call)


def test_in_place_is_a_kind_of_its_own() -> None:
    """What is not turned is copied, unless it is there already."""
    cos, sin, out = random(5, 4), random(5, 4), random(1, 2, 5, 32)
    config = RotaryConfig(False, False, 0)
    call = RotaryCall(random(1, 2, 5, 32), None, cos, sin, None, None, config)
    rotary_forward.plans.clear()
    rotary_forward(call, call.x, None)
    rotary_forward(call, out, None)
    assert len(rotary_forward.plans) == 2
    assert torch.equal(out[..., 8:], call.x[..., 8:])


# --- what is a kind ------------------------------------------------------------------------------


class Call(NamedTuple):
    x: Tensor
    y: Tensor | None
    option: int


class Kernel:
    """In the place of one of Triton's."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, enable_fp_fusion, **options: self.fn(*args, **options)

    @staticmethod
    def fn(x: Tensor, y: Tensor | None, out: Tensor, option: int = 1) -> None:
        out.copy_(x * option if y is None else x * option + y)


class Launcher:
    """A planned launcher, and how often it was asked for more than its plan."""

    def __init__(self, settings: Callable[[Any], Any] | None = None) -> None:
        self.asked = 0
        self.launch = plans.planned(settings)(self._launcher)

    def _launcher(self, launches: plans.Launches, call: Call, out: Tensor) -> None:
        self.asked += 1
        y = launches.vector(call.y)
        option = {} if call.option == 1 else {"option": call.option}
        launches.launch(Kernel(), (1,), call.x, y, out=out, **option)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.setattr(plans, "INTERPRETED", plans.INTERPRETED.__class__(True))
    return Launcher()


def test_what_makes_a_kind(launcher: Launcher) -> None:
    x, y, out = torch.randn(4, 4), torch.randn(4, 4), torch.empty(4, 4)
    flat = torch.randn(40)
    calls = [
        Call(x, None, 2), Call(x, y, 2), Call(x, None, 3), Call(x.mT, None, 2), Call(x, y.mT, 2),
        Call(x.double(), None, 2), Call(x[:1], None, 2), Call(flat[1:17].view(4, 4), None, 2),
    ]  # fmt: skip
    for count, call in enumerate(calls, 1):
        for _ in range(2):
            launcher.launch(call, out)
            expected = call.x * call.option + (0.0 if call.y is None else call.y)
            assert torch.equal(out, expected.float().expand(4, 4))
        assert launcher.asked == count


def test_settings_and_warming(launcher: Launcher) -> None:
    launcher = Launcher(lambda call: torch.is_inference_mode_enabled())
    x, out = torch.randn(4), torch.empty(4)
    for expected in (1, 2, 2):
        with torch.inference_mode(expected > 1):
            launcher.launch(Call(x, None, 1), out)
        assert launcher.asked == expected
    with tuning.warming():
        launcher.launch(Call(x, None, 1), out)
    assert launcher.asked == 3


def test_a_profiler_sees_every_launch(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        launch_enter_hook, launch_exit_hook = None, None

    monkeypatch.setattr(plans, "_RUNTIME", Runtime)
    x, out = torch.randn(4), torch.empty(4)
    for hook, expected in ((None, 1), (None, 1), (print, 2), (None, 2)):
        Runtime.launch_exit_hook = hook
        launcher.launch(Call(x, None, 1), out)
        assert launcher.asked == expected


def test_freed_storage_is_refused_each_time(launcher: Launcher) -> None:
    out = torch.empty(4)
    launcher.launch(Call(torch.randn(4), torch.randn(4), 1), out)
    y = torch.randn(4)
    y.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its storage was freed"):
            launcher.launch(Call(torch.randn(4), y, 1), out)


@pytest.mark.parametrize("interpreted", [False, True])
def test_memory_in_one_piece(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plan the pieces lie as they did: apart, each at a multiple of 16 bytes."""
    monkeypatch.setattr(plans, "INTERPRETED", plans.INTERPRETED.__class__(interpreted))
    launches = plans.Launches([torch.empty(1)])
    made = launches.empties(3, (5, 7))
    (step,) = launches.steps()
    tensors, handles = [torch.empty(1)], [0]
    step(tensors, handles, 0)
    assert len(tensors) == len(handles) == 4
    found = [x.data_ptr() if interpreted else x for x in handles[1:]]
    offsets = [[x - each[0] for x in each] for each in (found, [x.data_ptr() for x in made])]
    assert offsets[0] == offsets[1] == [0, 192, 384]
    assert tensors[1].data_ptr() == found[0]
    assert all(x.shape == (5, 7) for x in (*made, *(handles[1:] if interpreted else ())))


def test_plans_are_bounded(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 3)
    for size in (1, 2, 3, 4, 5, 4, 3, 1):
        x = torch.randn(size)
        launcher.launch(Call(x, None, 1), torch.empty(size))
        assert len(launcher.launch.plans) <= 3
    assert launcher.asked == 6


def test_plans_from_many_threads(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 4)
    wrong = []

    def work(seed: int) -> None:
        for step in range(300):
            x = torch.full((1 + (seed + step) % 7,), float(step))
            out = torch.empty_like(x)
            launcher.launch(Call(x, x, 2), out)
            if not torch.equal(out, 3 * x):
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(launcher.launch.plans) <= 4


# --- compiled ------------------------------------------------------------------------------------

COMPILED = """
import json, os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from fusedattn.benchmarks import host
from triton.runtime.driver import driver

def plain(x):
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return tuple(map(plain, x)) if isinstance(x, tuple) else x

launched = []
driver.set_active(host.Nothing(lambda *args: launched.append(plain(args[:6] + args[9:]))))
held = []  # so that no new memory lies where the first call's was
empty = torch.empty
torch.empty = lambda *args, **options: held.append(empty(*args, **options)) or held[-1]
told = {}
for name, launcher, call in host.launches():
    if name in ("attention forward", "RMS norm backward"):
        launched.clear()
        call()
        fresh = list(launched)
        launched.clear()
        call()
        told[name] = (fresh, list(launched), len(launcher.plans))
print(json.dumps(told))
"""


DESCRIBED = """
import json, os
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton
from fusedattn.benchmarks import host
from fusedattn.kernels import attention_tiles
from triton.runtime import _allocation
from triton.runtime.driver import driver

empty, sizes, told = torch.empty, [], []
torch.empty = lambda *args, device=None, **options: (sizes.append(args), empty(*args, **options))[1]
attention_tiles.FORWARD["mma, 99 KB"][64] = ((64, 64, 4, 2, "TMA"),)

def launch(*args):  # as Triton's launcher asks for scratch memory
    scratch = _allocation._allocator.get()(args[0] * 256, 128, args[3])
    told.append((scratch.dtype == torch.int8, sizes.pop() == (args[0] * 256,)))

def users(size, alignment, stream):
    raise AssertionError("the user's allocator")

driver.set_active(host.Nothing(launch))
triton.set_allocator(users)
name, launcher, call = next(host.launches())
for _ in range(3):
    call()
    assert _allocation._allocator.get() is users
assert len(launcher.plans) == 1
print(json.dumps(told))
"""


@pytest.mark.slow
def test_descriptors_lie_in_memory_of_torch() -> None:
    """By a plan or not, and whatever allocator of Triton's the user has set."""
    told = json.loads(in_a_new_process(DESCRIBED))
    assert told == [[True, True]] * 3


@pytest.mark.slow
def test_the_driver_gets_the_same_by_a_plan() -> None:
    """Grid, stream, function and arguments, but for memory that is allocated in the call."""
    told = json.loads(in_a_new_process(COMPILED))
    assert told.keys() == {"attention forward", "RMS norm backward"}
    for fresh, planned, count in told.values():
        assert count == 1
        assert len(fresh) == len(planned) > 0
        for one, other in zip(fresh, planned, strict=True):
            assert len(one) == len(other) > 10
            differing = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
            assert all(min(a, b) >> 40 for a, b in differing)
            assert len(differing) <= (0 if len(fresh) == 1 else 2)
