"""A model of transformers as it comes, compiled, and patched: the same results, then their speed.

Before anything is timed the two give the same: in training, in evaluation and on a part of the
tokens, the loss and the gradients of all parameters; in generation the scores of the new tokens, up
to the first that differs. Steps take turns in one process, in an order that rotates.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import fusedattn
import torch
from torch import Tensor, nn

from .harness import PeakMemory, Timing, clock_for
from .model_cases import TRAINING, Case, batch, build
from .versions import DTYPES, OURS

DEFAULT, COMPILED = "as it comes", "torch.compile"
FEWEST_ROUNDS, MOST_ROUNDS = 2, 15
# The largest distance of results, relative: that of gradients is of the norms of all of them.
ALLOWED = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-3}

Row = dict[str, Any]


@dataclass
class Run:
    """One version of a model at work; `call` is a training step or a generation."""

    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def first(self, device: torch.device) -> None:
        """Warms up; its memory counts, its time does not."""
        with PeakMemory(device) as probe:
            self.call()
        self.peak_bytes = probe.peak_bytes

    def timed(self, wait: Callable[[], None]) -> None:
        start = time.perf_counter()
        self.call()
        wait()
        self.seconds.append(time.perf_counter() - start)


def run_case(
    case: Case,
    device: torch.device,
    *,
    seconds: float,
    seed: int,
    compile_seconds: float = 0.0,
) -> Row:
    """One row: what was patched, how far results lie apart, and each version's speed and memory.

    `seconds` are for timing; every version has FEWEST_ROUNDS all the same. In training
    `torch.compile` is a peer where more than 0 seconds are left for it; how many it took the row
    says, as `compile_s`.
    """
    with quiet():
        plain = build(case, seed).to(device)
        ours = copy.deepcopy(plain)
        patch = fusedattn.patch(ours)
        short = case.shortened()
        distance = difference(plain, ours, short, device, seed)
        row: Row = {
            "case": {**asdict(case), "label": case.label},
            "unit": "token/s",
            "parameters": sum(x.numel() for x in plain.parameters()),
            "patched": _counted(patch.values()),
            "left": dict(patch.left),
            "difference": distance,
            "within_tolerance": distance <= ALLOWED[case.dtype],
            "skipped": {},
            "compile_s": 0.0,
            "not_ours": None,
        }
        given = {name: x.to(device) for name, x in batch(case, seed).items()}
        runs = {DEFAULT: Run(_call(plain, case, given))}
        if row["within_tolerance"]:
            runs[OURS] = Run(_call(ours, case, given))
        else:
            row["skipped"][OURS] = "its results are not those of the model as it comes"
        reason = _not_compiled(case, compile_seconds)
        if reason is None:
            start = time.perf_counter()
            reason = _add_compiled(runs, plain, case, given)
            row["compile_s"] = time.perf_counter() - start
        if reason is not None:
            row["skipped"][COMPILED] = reason
        _take_turns(runs, device, seconds)
        if OURS in runs and device.type == "cpu":
            row["not_ours"] = not_ours(runs[OURS].call)
    row["versions"] = {name: _figures(run, case.tokens) for name, run in runs.items()}
    return row | _ratios(row["versions"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of configs, which would stand between the tables."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _counted(found: Any) -> dict[str, int]:
    each = [what for names in found for what in names.split(", ")]
    return {what: each.count(what) for what in dict.fromkeys(each)}


# --- what is timed -------------------------------------------------------------------------------


def _call(model: Any, case: Case, given: dict[str, Tensor]) -> Callable[[], Any]:
    if case.task == TRAINING:
        return training_step(model, case, given)
    return lambda: generate(model, case, given)


def training_step(model: Any, case: Case, given: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward, in bf16 under autocast, backward and AdamW's update."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        _loss(model, case, given).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def _loss(model: Any, case: Case, given: dict[str, Tensor]) -> Tensor:
    device, half = next(model.parameters()).device.type, case.dtype != "fp32"
    with torch.autocast(device, DTYPES[case.dtype] if half else None, enabled=half):
        return model(**given).loss


def generate(model: Any, case: Case, given: dict[str, Tensor]) -> Any:
    """The likeliest tokens, as many as the case says, with their scores."""
    return model.generate(
        **given, do_sample=False, max_new_tokens=case.size.tokens, min_new_tokens=case.size.tokens,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip


def _not_compiled(case: Case, seconds: float) -> str | None:
    if case.task != TRAINING:
        return "it is compiled for training alone"
    return None if seconds > 0 else "compiled with --full, as long as there is time for it"


def _add_compiled(
    runs: dict[str, Run], plain: nn.Module, case: Case, given: dict[str, Tensor]
) -> str | None:
    """`torch.compile` of the model as it comes, compiled by a step; or why there is none."""
    torch._dynamo.reset()
    call = _call(torch.compile(copy.deepcopy(plain)), case, given)
    try:
        call()
    except Exception as error:  # whatever a compiler raises, the others run
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    runs[COMPILED] = Run(call)
    return None


# --- the same results ----------------------------------------------------------------------------


def difference(plain: Any, ours: Any, case: Case, device: torch.device, seed: int) -> float:
    """How far the results of the two lie apart, relative."""
    given = {name: x.to(device) for name, x in batch(case, seed).items()}
    if case.task == TRAINING:
        return _training_difference(plain, ours, case, given)
    return _generation_difference(plain, ours, case, given)


def _training_difference(plain: Any, ours: Any, case: Case, given: dict[str, Tensor]) -> float:
    """Of losses and gradients, without dropout, whose random numbers are not the same."""
    found = []
    for model in (plain, ours):
        model.eval()
        loss = _loss(model, case, given)
        loss.backward()
        grads = [x.grad for x in model.parameters() if x.grad is not None]
        found.append((loss.detach(), grads))
        model.zero_grad(set_to_none=True)
        model.train()
    (loss, grads), (own_loss, own_grads) = found
    if len(grads) != len(own_grads):
        return float("inf")
    apart = [(x - y).norm() for x, y in zip(own_grads, grads, strict=True)]
    of_grads = torch.stack(apart).norm() / torch.stack([x.norm() for x in grads]).norm()
    of_losses = (own_loss - loss).abs() / loss.abs()
    return float(torch.stack([of_losses.float(), of_grads]).max())


def _generation_difference(plain: Any, ours: Any, case: Case, given: dict[str, Tensor]) -> float:
    """Of the scores, as long as the tokens before them are the same."""
    found, own = (generate(model, case, given) for model in (plain, ours))
    differing = (found.sequences != own.sequences).any(0).nonzero()
    first = found.sequences.shape[1] - len(found.scores)
    alike = int(differing[0]) - first + 1 if len(differing) else len(found.scores)
    pairs = list(zip(found.scores, own.scores, strict=True))[:alike]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


# --- figures -------------------------------------------------------------------------------------


def _take_turns(runs: dict[str, Run], device: torch.device, seconds: float) -> None:
    clock = clock_for(device)
    for run in runs.values():
        run.first(device)
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        order = list(runs.values())
        first = turn % len(order)
        for run in order[first:] + order[:first]:
            run.timed(clock.wait)


def _figures(run: Run, tokens: int) -> Row:
    timing = Timing.of(run.seconds)
    return {
        "median_s": timing.median,
        "p20_s": timing.p20,
        "p80_s": timing.p80,
        "samples": timing.samples,
        "rate": tokens / timing.median,
        "rate_p20": tokens / timing.p80,
        "rate_p80": tokens / timing.p20,
        "peak_bytes": run.peak_bytes,
    }


def _ratios(versions: dict[str, Row]) -> Row:
    """How many times as fast as each other version ours is."""
    if OURS not in versions:
        return {"ours": None, "speedup": {}}
    seconds = versions[OURS]["median_s"]
    speedup = {name: x["median_s"] / seconds for name, x in versions.items() if name != OURS}
    return {"ours": OURS, "speedup": speedup}


def not_ours(call: Callable[[], Any]) -> float:
    """The share of a call's time outside the ops of fusedattn, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    events = profiled.key_averages()
    total = sum(x.self_cpu_time_total for x in events)
    own = sum(x.self_cpu_time_total for x in events if x.key.startswith("fusedattn::"))
    return 1.0 - own / total


def bf16_pays() -> bool:
    """Whether a matmul in bf16 takes at most twice the time that it takes in fp32."""
    size, taken = 384, {}
    for name in ("fp32", "bf16"):
        a = torch.randn(size, size).to(DTYPES[name])
        run = Run(lambda a=a: a @ a.t())
        for _ in range(4):
            run.timed(lambda: None)
        taken[name] = min(run.seconds)
    return taken["bf16"] <= 2 * taken["fp32"]
