"""Dropout in the norms: one mask everywhere, its statistics, its seeds."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.norm import NormCase, check_norm
from compare import device_for
from fusedattn.reference import functional as reference


def kept(shape: tuple[int, int], p: float, seed: int, backend: str) -> torch.Tensor:
    ones, zeros = torch.ones(shape, device=device_for(backend)), torch.zeros(shape)
    options = {"residual": zeros.to(ones.device), "dropout_p": p, "seed": seed}
    return fusedattn.layer_norm(ones, shape[1], backend=backend, **options)[1]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (6, 130), (3, 4100)], ids=str)
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, -1])
def test_the_mask_is_the_same_everywhere(shape, seed, any_backend):
    want = reference.dropout(torch.ones(shape), 0.3, torch.tensor([seed]))
    assert torch.equal(kept(shape, 0.3, seed, any_backend).cpu(), want)


def test_philox():
    """Random123's known answers: counter and key 0."""
    first = reference.philox(torch.tensor([0]), 4, *[torch.tensor([0])] * 3)
    assert [hex(x) for x in first.tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_dropout_statistics(instruction_set):
    z = kept((400, 1000), 0.25, 11, "cpu")
    assert z.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs((z == 0).double().mean().item() - 0.25) < 4e-3
    assert ((z[0] == 0) != (z[1] == 0)).any()


def test_dropout_of_everything(backend):
    x = torch.randn(4, 40, device=device_for(backend), requires_grad=True)
    out = fusedattn.layer_norm(x, 40, dropout_p=1.0, backend=backend)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_dropout_without_a_residual(backend):
    check_norm(NormCase("rms_norm", (6, 50), dropout_p=0.3), backend)
    check_norm(NormCase("layer_norm", (6, 50), dtype=torch.bfloat16, dropout_p=0.3), backend)


def test_seed_from_the_generator(fast_backend):
    x = torch.randn(4, 64)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(fusedattn.rms_norm(x, 64, dropout_p=0.5, backend=fast_backend))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    as_tensor = fusedattn.rms_norm(x, 64, dropout_p=0.5, seed=torch.tensor(9))
    assert torch.equal(as_tensor, fusedattn.rms_norm(x, 64, dropout_p=0.5, seed=9))
