"""The CUDA kernels' workspaces: torch's memory, on the call's device and stream, given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32
from cases.attention import AttentionCase, fused
from cases.norm import NormCase, results
from fusedattn import _native
from fusedattn.ops.attention_config import AttentionBackwardCall, configure
from test_cuda_rowwise import set_device
from torch import Tensor

emulated = _native.cuda_emulated()
needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

# --- what is asked for ---------------------------------------------------------------------------


class Asked(list):
    """(bytes, device, stream) of each workspace; the memory is held weakly."""

    def __init__(self) -> None:
        self.memory: list[weakref.ref] = []

    def __call__(self, size: int, device: int, stream: int) -> Tensor:
        self.append((size, device, stream))
        found = torch.empty(size, dtype=torch.uint8)
        self.memory.append(weakref.ref(found))
        return found

    def given_back(self) -> bool:
        return all(memory() is None for memory in self.memory)


@pytest.fixture
def allocate_by() -> Iterator[Callable]:
    yield emulated.allocate_by
    emulated.allocate_by(_native.emulated_workspace)


def call_of(case: AttentionCase, deterministic: bool) -> tuple[AttentionBackwardCall, list[Tensor]]:
    """A backward, and the tensors that it writes to."""
    made = case.inputs()
    q, k, v = made["q"], made["k"], made["v"]
    lse = torch.zeros(q.shape[:3])
    config = configure(case.dim, deterministic=deterministic)
    call = AttentionBackwardCall(made["dout"], None, made["dout"], lse, q, k, v, config=config)
    return call, [torch.full_like(x, 7.0) for x in (q, k, v)]


HEADS, DIM = 2, 64
TERMS = 2 * HEADS * 128 * 4  # shift and Δ of each query, padded to 128
SUMS = HEADS * 64 * DIM * 4  # of dQ, in whole tiles of queries
NORMS = HEADS * 4 * 4  # three maxima and e of each head


@needs_emulator
@pytest.mark.parametrize(
    ("dtype", "deterministic", "size"),
    [(BF16, False, TERMS + SUMS), (BF16, True, TERMS), (F16, True, TERMS + NORMS)],
)
def test_attention_asks_once_for_what_it_needs(dtype, deterministic, size, allocate_by) -> None:
    allocate_by(asked := Asked())
    case = AttentionCase(batch=1, heads=HEADS, seq_q=40, dim=DIM, dtype=dtype)
    call, grads = call_of(case, deterministic)
    emulated.attention_backward(call, *grads, None, None, None, 12345)
    assert asked == [(size, 0, 12345)]
    assert asked.given_back()


@needs_emulator
@pytest.mark.parametrize(
    ("case", "size"),
    [(NormCase(shape=(5, 64)), 2 * 64 * 4),  # of one block, sums for the weight and the bias
     (NormCase(shape=(4, 33)), (4 * 2 * 33 + 4 * 2) * 4)],  # of four; and each row's two sums
    ids=["rows", "strips"],
)  # fmt: skip
def test_norms_ask_once_for_what_they_need(case, size, allocate_by) -> None:
    set_device("cuda_emulated", multiprocessors=100)
    allocate_by(asked := Asked())
    results(case.inputs(), case, fusedattn, backend="cuda_emulated")
    assert [each[0] for each in asked] == [size]
    assert asked.given_back()


# --- no memory -----------------------------------------------------------------------------------


def no_memory(size: int, device: int, stream: int) -> Tensor:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")


@needs_emulator
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_without_memory_nothing_is_launched(dtype, deterministic, allocate_by) -> None:
    call, grads = call_of(AttentionCase(seq_q=20, dim=DIM, dtype=dtype), deterministic)
    before = emulated.switches()
    allocate_by(no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        emulated.attention_backward(call, *grads, None, None, None)
    assert emulated.switches() == before
    allocate_by(_native.emulated_workspace)
    emulated.attention_backward(call, *grads, None, None, None)  # nothing is left behind


@needs_emulator
@pytest.mark.parametrize("shape", [(5, 64), (4, 33)])
def test_the_error_of_torch_comes_through_autograd(shape, allocate_by) -> None:
    case = NormCase(shape=shape, dtype=F32)
    allocate_by(no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        results(case.inputs(), case, fusedattn, backend="cuda_emulated")


# --- torch's side --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [5, 9], ids=["current", "another"])
def test_memory_is_of_the_device_and_stream_of_the_call(stream, monkeypatch) -> None:
    """What torch.empty is asked for, and under which stream, on a machine of two pretended GPUs."""
    current = {torch.device("cuda", 0): [7], torch.device("cuda", 1): [5]}

    def under(stream: SimpleNamespace) -> AbstractContextManager:
        current[stream.device].append(stream.cuda_stream)
        return nullcontext()

    def stream_of(value: int, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=value, device=device)

    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: stream_of(current[device][-1], device)
    )
    monkeypatch.setattr(torch.cuda, "ExternalStream", stream_of)
    monkeypatch.setattr(torch.cuda, "stream", under)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: (n, dtype, current[device][-1]))
    assert _native.cuda_workspace(300, 1, stream) == (300, torch.uint8, stream)


# --- on a GPU ------------------------------------------------------------------------------------

CASE = AttentionCase(seq_q=300, dim=64, dtype=F16, causal=True)


@pytest.mark.gpu
def test_cuda_memory_is_counted_and_given_back() -> None:
    made = CASE.inputs("cuda")
    fused(made, CASE, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = fused(made, CASE, "cuda")
    kept = sum(x.untyped_storage().nbytes() for x in found.values())
    sums = CASE.batch * CASE.heads * 300 * 64 * 4
    assert torch.cuda.max_memory_allocated() - before >= kept + sums
    del found
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Replayed after others have used the memory that the allocator has to give."""
    made = CASE.inputs("cuda")
    want = fused(made, CASE, "cuda", deterministic=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fused(made, CASE, "cuda", deterministic=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = fused(made, CASE, "cuda", deterministic=True)
    for _ in range(3):
        noise = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(8, 24)]
        graph.replay()
        torch.cuda.synchronize()
        del noise
        assert all(torch.equal(found[name], x) for name, x in want.items())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_cuda_device_that_is_not_the_current_one() -> None:
    want = fused(CASE.inputs("cuda:0"), CASE, "cuda", deterministic=True)
    before = torch.cuda.memory_allocated(0)
    found = fused(CASE.inputs("cuda:1"), CASE, "cuda", deterministic=True)
    assert torch.cuda.memory_allocated(0) == before
    assert all(torch.equal(found[name].to("cuda:0"), x) for name, x in want.items())
