"""The emulator that runs the CUDA kernels here: right kernels pass, each planted flaw is caught.

The kernels stand in csrc/cuda/emulator/tests; `python setup.py build_emulator` builds them.
"""

from __future__ import annotations

import itertools
import re
import shutil

import pytest
import torch
from fusedattn import _native

emulated = _native.cuda_emulated()

needs_emulator = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_emulator_is_built_where_there_is_a_compiler() -> None:
    assert emulated is not None, "run python setup.py build_emulator"


def run(kernel: str, flaw: str = "", rows: int = 6, width: int = 64) -> list[torch.Tensor]:
    """One of the kernels on random numbers: its input and its output."""
    x = torch.randn(rows, width)
    out = torch.full_like(x, 7.0)
    emulated.planted(kernel, x, out, flaw)
    return [x, out]


@needs_emulator
@pytest.mark.parametrize("seed", range(20))
class TestRightKernels:
    @pytest.fixture(autouse=True)
    def _orders(self, seed: int) -> None:
        emulated.seed(seed)

    def test_shared_memory_and_barrier(self) -> None:
        x, out = run("reverse", width=96)
        assert torch.equal(out, x.flip(1))

    def test_packs(self) -> None:
        x, out = run("copy", width=160)
        assert torch.equal(out, x)

    def test_shuffles_and_atomic_addition(self) -> None:
        x, out = run("sum")
        torch.testing.assert_close(out[0, 0], x.sum())
        assert not out.flatten()[1:].any()

    def test_cluster(self) -> None:
        x, out = run("exchange", rows=4)
        assert torch.equal(out.view(2, 2, 64), x.view(2, 2, 64).mean(1, True).expand(2, 2, 64))

    def test_strided_rows(self) -> None:
        x, out = torch.randn(5, 128)[:, 32:96], torch.full((5, 200), 7.0)
        emulated.planted("copy", x, out[:, 4:68])
        assert torch.equal(out[:, 4:68], x)
        assert (out[:, :4] == 7).all()
        assert (out[:, 68:] == 7).all()

    def test_in_place(self) -> None:
        x = torch.randn(5, 64)
        expected = x.flip(1)
        emulated.planted("reverse", x, x)
        assert torch.equal(x, expected)


# kernel, flaw, and what the message says.
FLAWS = [
    ("reverse", "divergent barrier", r"a race|not all threads reach a barrier.* 1 have ended: 7"),
    ("reverse", "two barriers", r"divergence: it reaches sync_block\(\), planted.cu:\d+"),
    ("reverse", "ended lane", r"not all threads reach a barrier; 63 wait.* 1 have ended: 40"),
    (
        "reverse",
        "past shared",
        r"shared store of 4 bytes .* outside shared memory: byte 256 of",
    ),
    ("reverse", "shared as global", r"global load of 4 bytes at 0x\w+: outside every tensor"),
    (
        "copy",
        "past the end",
        r"thread 15: global store of 16 bytes .* 0 bytes past the end of",
    ),
    ("copy", "misaligned", r"thread 2: global load of 16 bytes at 0x\w+: misaligned"),
    ("copy", "unwritten", r"no kernel has written element 380 of tensor 1 \(6, 64, 1, 1\) float32"),
    ("copy", "written input", r"global store of 16 bytes at 0x\w+: an input: tensor 0"),
    ("sum", "mismatched shuffle", r"divergence: it reaches a shuffle of 4 bytes|not all threads"),
    ("exchange", "no first cluster barrier", r"a block that may not have begun"),
    ("exchange", "no last cluster barrier", r"the block ends and its shared memory with it"),
]


@needs_emulator
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kernel", "flaw", "message"), FLAWS, ids=[x[1] for x in FLAWS])
def test_flaw_is_caught(kernel: str, flaw: str, message: str, seed: int) -> None:
    emulated.seed(seed)
    with pytest.raises(RuntimeError, match=f"emulator: .*(?:{message})") as caught:
        run(kernel, flaw)
    if flaw != "unwritten":  # which is seen when all kernels of a call have run
        assert f"kernel {kernel}, block " in str(caught.value)
    x, out = run("reverse")  # nothing is left behind
    assert torch.equal(out, x.flip(1))


# The same of a flaw that is planted in a right kernel.
PLANTED = [
    ("reverse", "no barrier", r"block \d, thread \d+: shared .* a race at shared byte \d+"),
    ("sum", "no atomic", r"a race in tensor 1 .* with a store"),
]


@needs_emulator
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kernel", "flaw", "message"), PLANTED, ids=[x[1] for x in PLANTED])
def test_planted_flaw_is_caught(kernel: str, flaw: str, message: str, seed: int) -> None:
    emulated.seed(seed)
    emulated.watch()
    run(kernel)
    places = [i for i, each in enumerate(emulated.flaws()) if each.startswith(f"{kernel}: {flaw},")]
    assert len(places) == 1
    emulated.plant(places[0])
    try:
        with pytest.raises(RuntimeError, match=f"emulator: kernel {kernel}, .*(?:{message})"):
            run(kernel, rows=5)
    finally:
        emulated.plant()
    run(kernel)


@needs_emulator
def test_store_between_rows_is_caught() -> None:
    x, out = torch.randn(5, 64), torch.zeros(5, 128)[:, :64]
    with pytest.raises(RuntimeError, match=r"in a gap|past the end"):
        emulated.planted("copy", x, out, "in a gap")


@needs_emulator
def test_orders_vary_and_repeat() -> None:
    def order(seed: int) -> list[float]:
        emulated.seed(seed)
        return run("order", rows=4, width=32)[1].flatten().tolist()

    orders = [order(seed) for seed in range(20)]
    assert all(sorted(each) == list(range(128)) for each in orders)
    assert len({tuple(each) for each in orders}) == 20
    assert len({each[0] // 32 for each in orders}) == 4  # every block is sometimes the first
    assert order(3) == orders[3]


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(dtype: torch.dtype) -> None:
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = torch.stack([exact[:-1], exact[1:]]).double().mean(0).float()
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 2.0**-25, 3.4e38, -1e30, float("inf")]
    x = torch.cat([exact, halfway, -halfway, torch.tensor(special), torch.randn(1 << 12) * 100])
    x = torch.nn.functional.pad(x, (0, -len(x) % 128)).view(-1, 128)
    out = torch.empty_like(x)
    emulated.planted("to f16" if dtype == torch.float16 else "to bf16", x, out)
    torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@needs_emulator
@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [(3, 64, "grid is not a multiple of cluster"), (2, 48, "block is not a multiple of 32"),
     (2, 2048, "block is not in 32 … 1024")],
)  # fmt: skip
def test_launch_is_refused(rows: int, width: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"kernel exchange: launch refused, {message} \(grid"):
        run("exchange", rows=rows, width=width)


@needs_emulator
def test_more_blocks_than_a_grid_has_are_refused() -> None:
    x = torch.zeros(1, 64).expand(2**31, 64)
    before = emulated.switches()
    with pytest.raises(ValueError, match="reverse needs 2147483648 blocks, a grid has"):
        emulated.planted("reverse", x, x)
    assert emulated.switches() == before


@needs_emulator
def test_clusters_need_hopper() -> None:
    try:
        emulated.device(capability=80)
        with pytest.raises(RuntimeError, match="clusters need sm_90"):
            run("exchange")
    finally:
        emulated.device()


@needs_emulator
def test_switching_is_cheap() -> None:
    before = emulated.switches()
    run("reverse", rows=100, width=1024)
    assert emulated.switches() - before == 2 * 100 * 1024


@needs_emulator
def test_failures_leak_no_stacks() -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    for _ in itertools.repeat(None, 3):
        with pytest.raises(RuntimeError):
            run("reverse", "ended lane")
    before = mappings()
    for _ in itertools.repeat(None, 50):
        with pytest.raises(RuntimeError, match=re.escape("1 have ended")):
            run("reverse", "ended lane")
    assert mappings() <= before + 5
