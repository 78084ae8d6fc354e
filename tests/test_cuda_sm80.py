"""What sm_80 adds, on the emulator: copies that run on their own, ldmatrix, mma.sync and cvt.

Expected fragments are computed here from the PTX ISA's formulas (Matrix Fragments for mma.m16n8k16
with floating point type; ldmatrix), independently of the emulator's own. The kernels stand in
csrc/cuda/emulator/tests/instructions.cu; test_cuda_emulator.py tests what all targets have.
"""

from __future__ import annotations

import pytest
import torch
from fusedattn import _native
from torch import Tensor

emulated = _native.cuda_emulated()

pytestmark = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> str:
    return request.param


# --- fragments, by the PTX ISA's formulas --------------------------------------------------------


def places_a(lane: int, i: int) -> tuple[int, int]:
    """Row and column of a_i."""
    row = lane // 4 if i % 4 < 2 else lane // 4 + 8
    return row, lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def places_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def places_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2


def indices(places, elements: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the elements of all lanes, (32, elements) each."""
    table = torch.tensor([[places(lane, i) for i in range(elements)] for lane in range(32)])
    return table[..., 0], table[..., 1]


def fragments(matrices: Tensor, places, elements: int) -> Tensor:
    """(n, rows, columns) to (n, 32, registers): halves in pairs, the first one in the low bits."""
    rows, columns = indices(places, elements)
    chosen = matrices[:, rows, columns].contiguous()
    return chosen if chosen.element_size() == 4 else chosen.view(torch.int32)


def product(half: str, a: Tensor, b: Tensor, c: Tensor, flaw: str = "") -> Tensor:
    """c + a b by mma: (n, 16, 16), (n, 16, 8), (n, 16, 8)."""
    out = torch.empty(len(a), 32, 4)
    inputs = [fragments(a, places_a, 8), fragments(b, places_b, 4), fragments(c, places_c, 4)]
    emulated.instructions(f"mma {half}", inputs, out, flaw)
    rows, columns = indices(places_c, 4)
    result = torch.full_like(c, float("nan"))
    result[:, rows, columns] = out
    return result


def problem(half: str, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    dtype = HALVES[half]
    return torch.randn(n, 16, 16).to(dtype), torch.randn(n, 16, 8).to(dtype), torch.randn(n, 16, 8)


class TestMma:
    def test_every_place(self, half: str) -> None:
        """One non-zero element in A and one in B: each product goes where it belongs, exactly."""
        a, b = torch.zeros(256, 16, 16), torch.zeros(256, 16, 8)
        n = torch.arange(256)
        a[n, n // 16, n % 16] = torch.arange(1, 257).float()
        b[n] = torch.arange(1, 129).float().view(16, 8)
        a, b = a.to(HALVES[half]), b.to(HALVES[half])
        c = torch.arange(128.0).view(1, 16, 8).expand(256, 16, 8).contiguous() * 2
        assert torch.equal(product(half, a, b, c), torch.baddbmm(c, a.float(), b.float()))

    @pytest.mark.parametrize("seed", range(5))
    def test_random(self, half: str, seed: int) -> None:
        emulated.seed(seed)
        a, b, c = problem(half)
        expected = torch.baddbmm(c.double(), a.double(), b.double())
        torch.testing.assert_close(product(half, a, b, c).double(), expected, rtol=0, atol=2e-5)

    def test_products_are_exact(self, half: str) -> None:
        """Rounded to the input's dtype on the way, the difference of near squares would be lost."""
        dtype = HALVES[half]
        eps = torch.finfo(dtype).eps
        a, b, c = torch.zeros(2, 16, 16), torch.zeros(2, 16, 8), torch.zeros(2, 16, 8)
        a[:, :, 0], a[:, :, 1] = 1 + eps, 1
        b[:, 0], b[:, 1] = 1 + eps, -1
        expected = torch.full_like(c, (1 + eps) ** 2 - 1)
        assert torch.equal(product(half, a.to(dtype), b.to(dtype), c), expected)

    def test_subnormals(self) -> None:
        a, b, c = torch.zeros(2, 16, 16), torch.zeros(2, 16, 8), torch.zeros(2, 16, 8)
        a[:, 3, 5], b[:, 5, 2] = 2.0**-24, 3 * 2.0**-24
        out = product("f16", a.half(), b.half(), c)
        assert out[0, 3, 2] == 3 * 2.0**-48
        assert out.count_nonzero() == 2

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, half: str, value: float) -> None:
        for where in range(3):
            a, b, c = problem(half, 2)
            [a, b, c][where][1, 3, 5] = value
            expected = torch.baddbmm(c, a.float(), b.float())
            actual = product(half, a, b, c)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
            assert not actual[1].isfinite().all()

    def test_missing_lane(self, half: str) -> None:
        with pytest.raises(RuntimeError, match=rf"62 wait.* mma<{half}>\(\).* 2 have ended: "):
            product(half, *problem(half, 2), "absent lane")

    def test_lanes_at_different_products(self, half: str) -> None:
        with pytest.raises(RuntimeError, match=r"divergence: it reaches mma<\w+>\(\)"):
            product(half, *problem(half, 2), "two dtypes")


@pytest.mark.parametrize("half", HALVES)
def test_pair(half: str) -> None:
    special = [0.0, -0.0, 65519.9, 65520.0, 1e-8, 2.0**-25, 3 * 2.0**-26, 3.4e38, float("inf")]
    x = torch.cat([torch.tensor(special), -torch.tensor(special), torch.randn(4078) * 100])
    x = x.view(-1, 2)
    out = torch.empty(len(x), 1, dtype=torch.int32)
    emulated.instructions(f"pair {half}", [x], out)
    assert torch.equal(out.view(HALVES[half]), x.to(HALVES[half]))


# --- ldmatrix ------------------------------------------------------------------------------------


def load_matrices(
    x: Tensor, rows: Tensor, transposed: bool = False, flaw: str = ""
) -> tuple[Tensor, Tensor]:
    """Of x (32, 8): what the emulator loads where lane i names row rows[i]; what PTX says."""
    out = torch.empty(32, 4, dtype=torch.int32)
    emulated.instructions("transposed" if transposed else "matrices", [x, rows], out, flaw)
    matrices = x[rows.long()].view(4, 8, 8)
    if transposed:
        matrices = matrices.mT
    lane = torch.arange(32)
    low = matrices[:, lane // 4, lane % 4 * 2]  # (matrix, lane)
    high = matrices[:, lane // 4, lane % 4 * 2 + 1]
    return out.view(x.dtype), torch.stack([low, high], -1).permute(1, 0, 2).reshape(32, 8)


@pytest.mark.parametrize("transposed", [False, True])
class TestLdmatrix:
    @pytest.mark.parametrize("seed", range(5))
    def test_fragments(self, transposed: bool, seed: int) -> None:
        emulated.seed(seed)
        x = torch.arange(256).view(32, 8).bfloat16()  # each number is exact
        rows = torch.randint(0, 32, (32,), dtype=torch.int32)
        for each in (torch.arange(32, dtype=torch.int32), rows):
            assert torch.equal(*load_matrices(x, each, transposed))

    @pytest.mark.parametrize(
        ("flaw", "message"),
        [
            ("misaligned source", r"thread 5: shared load of 16 bytes at 0x\w+: misaligned"),
            ("past shared", r"thread 6: shared load of 16 .* outside shared memory: byte 608 of"),
            ("diverged", r"divergence: it reaches load_matrices(_transposed)?\(\), instruc\w+.cu:"),
            ("absent lane", r"not all threads reach a barrier; 31 wait.* load_matrices.*ended: 9"),
        ],
    )
    def test_flaw_is_caught(self, transposed: bool, flaw: str, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            load_matrices(
                torch.randn(32, 8).half(), torch.arange(32, dtype=torch.int32), transposed, flaw
            )


# --- asynchronous copies -------------------------------------------------------------------------


def pipeline(
    flaw: str = "", rows: int = 9, width: int = 712, chunks: int = 96
) -> tuple[Tensor, Tensor]:
    """Rows in chunks of 8 elements, those past `width` as zeros: what comes out, and should."""
    x = torch.randn(rows, width).half()
    out = torch.empty(rows, 8 * chunks).half()
    emulated.instructions("pipeline", [x], out, flaw)
    padded = torch.nn.functional.pad(x, (0, 8 * chunks - width))
    return out, padded.view(rows, chunks, 8).flip(1).reshape(rows, -1)


@pytest.mark.parametrize("seed", range(20))
def test_pipeline(seed: int) -> None:
    emulated.seed(seed)
    assert torch.equal(*pipeline())


def test_copies_land_at_the_wait() -> None:
    """Between two waits the source changes: what the first one covers shows the old numbers."""
    x = torch.randn(2, 32).half()
    first, second = x.clone()
    out = torch.empty(32).half()
    emulated.instructions("late", [x, x], out)
    assert torch.equal(out, torch.cat([first[:16], second[16:]]))


NOT_LANDED = r"a copy that no wait_copies\(\) has landed by thread \d+"
FLAWS = {
    "store in flight": rf"shared store of 16 bytes .* {NOT_LANDED}",
    "copied twice": rf"shared copy of 16 bytes .* {NOT_LANDED}",
    "misaligned source": r"thread 3: global load of 16 bytes at 0x\w+: misaligned",
    "misaligned zeros": r"copy_async\(\) of zeros: the address in global memory is misaligned",
    "misaligned destination": r"thread 3: shared copy of 16 bytes at 0x\w+: misaligned",
    "past the end": r"global load of 16 bytes .* outside every tensor: \d+ bytes past the end of",
    "past shared": r"thread 95: shared copy .* outside shared memory: byte 4608 of 4608",
    "into global": r"thread 3: shared copy of 16 bytes .* outside shared memory",
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("flaw", FLAWS)
def test_flaw_is_caught(flaw: str, seed: int) -> None:
    emulated.seed(seed)
    with pytest.raises(RuntimeError, match=f"emulator: kernel pipeline, .*(?:{FLAWS[flaw]})"):
        pipeline(flaw)
    assert torch.equal(*pipeline())  # nothing is left behind


RACE = r"a race at shared byte \d+"
PLANTED = {
    "no wait": NOT_LANDED,
    "wait for one less": NOT_LANDED,
    "no commit": NOT_LANDED,
    "no barrier": f"{RACE}|{NOT_LANDED}",
    "copies anyway": "outside every tensor",
    "next place": f"{RACE}|{NOT_LANDED}|past shared memory|outside shared memory",
}


@pytest.mark.parametrize("seed", range(5))
def test_planted_flaws_are_caught(seed: int) -> None:
    """Those of csrc/cuda/emulator/flaws.h, at every place of the pipeline."""
    emulated.seed(seed)
    emulated.watch()
    assert torch.equal(*pipeline())
    kinds = [each.split(":")[1].split(",")[0].strip() for each in emulated.flaws()]
    assert kinds.count("no barrier") == 2
    assert set(kinds) == {*PLANTED, "no zeros", "wrong swizzle"}
    try:
        for i, kind in enumerate(kinds):
            emulated.plant(i)
            if kind in PLANTED:
                with pytest.raises(RuntimeError, match=PLANTED[kind]):
                    pipeline()
            else:
                assert not torch.equal(*pipeline())
    finally:
        emulated.plant()
    assert torch.equal(*pipeline())
