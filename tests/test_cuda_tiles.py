"""The words of csrc/cuda/sm80/tile.cuh, and what the emulator makes of flaws in their use.

A small attention of theirs stands in csrc/cuda/emulator/tests/tiles.cu. It is right under every
order of threads; with one planted flaw either the emulator ends it or the tolerance rule fails.
"""

from __future__ import annotations

import pytest
import torch
from compare import check
from fusedattn import _native
from fusedattn.reference import functional as reference

emulated = _native.cuda_emulated()

pytestmark = pytest.mark.skipif(emulated is None, reason="needs setup.py build_emulator")


def attend(
    dtype: torch.dtype = torch.float16, seq_q: int = 40, seq_k: int = 70, dim: int = 64, flaw="none"
) -> None:
    """The small attention, held to the tolerance rule."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(seq_q, dim), (seq_k, dim), (seq_k, dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    out = torch.empty_like(q)
    emulated.attend(q, k, v, out, dim**-0.5, flaw)
    batch = [x[None, None] for x in (q, k, v)]
    check(
        out[None, None],
        reference.attention(*(x.double() for x in batch))[0],
        reference.attention(*batch)[0],
        what=f"attention, {flaw}",
    )


@pytest.mark.parametrize("seed", range(20))
def test_right_under_every_order(seed: int) -> None:
    emulated.seed(seed)
    attend(torch.float16)
    attend(torch.bfloat16)


SHAPES = {
    "whole tiles": (64, 64, 64),
    "one tile": (32, 32, 64),
    "one query, one key": (1, 1, 64),
    "tails": (33, 65, 64),
    "narrow": (40, 70, 24),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    attend(dtype, *SHAPES[shape])


NOT_LANDED = r"a copy that no wait_copies\(\) has landed"
ENDS = {
    "no wait": NOT_LANDED,
    "wait for one less": NOT_LANDED,
    "no barrier after wait": rf"a race at shared byte \d+ with (a load|a store|{NOT_LANDED})",
    "no barrier before copy": rf"a race at shared byte \d+ with (a load|{NOT_LANDED})",
    "no barrier before output": r"a race at shared byte \d+ with (a store|a load)",
    "no zeros": r"global load of 16 bytes at 0x\w+: outside every tensor",
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("flaw", ENDS)
def test_flaw_ends_the_kernel(flaw: str, seed: int) -> None:
    emulated.seed(seed)
    with pytest.raises(RuntimeError, match=f"emulator: kernel attend, .*(?:{ENDS[flaw]})"):
        attend(flaw=flaw)


@pytest.mark.parametrize("flaw", ["no swizzle", "shifted swizzle", "one tile less", "one key more"])
def test_flaw_fails_the_comparison(flaw: str) -> None:
    with pytest.raises(AssertionError, match=f"attention, {flaw}"):
        attend(flaw=flaw)
