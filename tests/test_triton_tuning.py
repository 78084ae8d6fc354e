"""kernels/tuning.py, and `fusedattn.warmup`, with a clock in the place of a GPU's events."""

from __future__ import annotations

import fusedattn
import pytest
import torch

pytest.importorskip("triton")
from fusedattn.kernels import tuning
from fusedattn.kernels.tuning import WORTHWHILE, Key, Tuner
from triton import Config

SLOW, FAST = Config({}, num_warps=8), Config({}, num_warps=4)
KEY = Key("bf16, 64", (1024, 1024, 8))


class Clock:
    """torch.cuda.Event: a launch takes as many milliseconds as it has warps."""

    now = 0.0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        Clock.waited += 1

    def elapsed_time(self, end: Clock) -> float:
        return end.at - self.at


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """On a made-up GPU: what was launched to be timed."""
    monkeypatch.setattr(tuning, "INTERPRETED", tuning.INTERPRETED.__class__(False))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("waits for the device"))
    return []


def pick(tuner: Tuner, launched: list, candidates=(SLOW, FAST), key=KEY, fails=(), **about):
    def launch(config: Config) -> None:
        if config in fails:
            raise fails[config]
        launched.append(config)
        Clock.now += config.num_warps

    about = {"work": WORTHWHILE, "deterministic": False} | about
    return tuner.pick(key, candidates, launch, **about)


def test_the_fastest_is_timed_once(launched: list) -> None:
    tuner = Tuner()
    assert pick(tuner, launched) is FAST
    assert launched == [SLOW] * (tuning.TIMED + 1) + [FAST] * (tuning.TIMED + 1)
    assert pick(tuner, launched) is FAST
    assert len(launched) == 2 * (tuning.TIMED + 1)


@pytest.mark.parametrize(
    "about",
    [{"candidates": (SLOW,)}, {"deterministic": True}, {"work": WORTHWHILE - 1}],
    ids=["one candidate", "deterministic call", "little work"],
)
def test_nothing_is_timed(about: dict, launched: list) -> None:
    assert pick(Tuner(), launched, **about) is SLOW
    assert launched == []


def test_under_deterministic_algorithms(launched: list, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner()
    assert pick(tuner, launched) is FAST
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert pick(tuner, launched) is SLOW


@pytest.mark.parametrize("how", ["capture", "inference mode"])
def test_who_may_not_wait_gets_that_of_the_nearest_sizes(
    how: str, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Tuner()
    near, far = Key(KEY.kind, (512, 1024, 8)), Key(KEY.kind, (64, 64, 1))
    assert pick(tuner, launched, key=near) is FAST
    assert pick(tuner, launched, key=far, candidates=(SLOW, SLOW)) is SLOW
    timed = len(launched)
    capturing = how == "capture"
    monkeypatch.setattr(tuning, "is_capturing", lambda: capturing)
    with torch.inference_mode(not capturing):
        assert pick(tuner, launched) is FAST
        assert pick(tuner, launched, key=Key("fp16, 64", KEY.sizes)) is SLOW
    assert len(launched) == timed


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("ptxas"), MemoryError()], ids=repr
)
def test_a_candidate_that_fails_loses(error: Exception, launched: list) -> None:
    assert pick(Tuner(), launched, fails={FAST: error}) is SLOW


def test_warming_times_what_would_not_be(launched: list) -> None:
    tuner = Tuner()
    with tuning.warming(), torch.inference_mode():
        assert pick(tuner, launched, work=1) is FAST
        assert pick(tuner, launched, work=1, deterministic=True) is SLOW
    with torch.inference_mode():
        assert pick(tuner, launched) is FAST


def test_warmup_runs_forward_and_backward_and_leaves_no_trace() -> None:
    weight = torch.ones(4, requires_grad=True)
    passed = []

    def function(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
        passed.append("forward")
        if x.requires_grad and torch.is_grad_enabled():
            x.register_hook(lambda dx: passed.append("backward"))
        return fusedattn.softmax(x * scale * torch.rand(4)), scale

    state = torch.get_rng_state()
    fusedattn.warmup(function, weight, scale=2.0)
    assert passed == ["forward", "backward"]
    with torch.inference_mode():
        fusedattn.warmup(function, torch.ones(4), scale=2.0)
    assert passed == ["forward", "backward", "forward"]
    assert weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    fusedattn.warmup(fusedattn.nn.LayerNorm(4), torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"warmup: got function of type Tensor"):
        fusedattn.warmup(weight)
