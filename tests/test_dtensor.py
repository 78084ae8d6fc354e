"""DTensors: what each sharding rule computes, where it lies, what is sent, and what is refused.

Everything runs in one pair of processes, and each test reads how its part went in both.
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fusedattn
import pytest
import torch
import torch.distributed as dist
from cases.dtensor import S0, S1, S2, Case, P, R, cases, inputs, normal
from ops import OPS, arguments, outputs
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

PROCESSES = 2


# --- in each of the processes ---------------------------------------------------------------------


def spread(x: torch.Tensor, at: Any) -> DTensor:
    return distribute_tensor(x, init_device_mesh("cpu", (PROCESSES,)), [at])


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def graded(run: Callable, tensors: dict, wanted: list[str], cotangents: list) -> tuple:
    """The outputs of `run`, and the gradients of `wanted`."""
    given = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    found = outputs(run(**given))
    return found, torch.autograd.grad(found, [given[name] for name in wanted], cotangents)


def check_case(case: Case) -> None:
    """Hold a call on DTensors to that on the whole tensors; without gradients first."""
    plain = {name: x for name, (x, *_) in case.tensors.items()}
    wanted = [name for name, (*_, grad) in case.tensors.items() if grad is not None]
    made = [normal(*y.shape).to(y.dtype) for y in outputs(case.run(**plain))]
    want, want_grads = graded(case.run, plain, wanted, made)

    parts = {name: spread(x, at) for name, (x, at, _) in case.tensors.items()}
    given = [spread(y, at) for y, at in zip(made, case.outs, strict=True)]
    with CommDebugMode() as sent:
        for y in outputs(case.run(**parts)):
            assert y.placements in {(at,) for at in case.outs}
        graded(case.run, parts, wanted[:1], given)  # fewer gradients: torch caches by arguments
        found, grads = graded(case.run, parts, wanted, given)
    assert (sent.get_total_counts() == 0) is case.silent, sent.get_comm_counts()
    for x, y, at in zip(found, want, case.outs, strict=True):
        assert x.placements == (at,), (x.placements, at)
        assert torch.equal(whole(x), y)
    for name, x, y in zip(wanted, grads, want_grads, strict=True):
        at = case.tensors[name][2]
        assert x.placements == (at,), (name, x.placements, at)
        assert x.dtype == y.dtype
        torch.testing.assert_close(whole(x), y)


def inference_mode() -> None:
    x = normal(2, 4, 8)
    with torch.inference_mode():
        assert torch.equal(whole(fusedattn.softmax(spread(x, S0))), fusedattn.softmax(x))


def gradient_elsewhere() -> None:
    """Then what was kept of each row moves with its row."""
    x, dout = normal(2, 6, 8).requires_grad_(), normal(2, 6, 8)
    (want,) = torch.autograd.grad(fusedattn.layer_norm(x, 8), x, dout)
    for at in (R, S0, S2):
        part = spread(x.detach(), S1).requires_grad_()
        (found,) = torch.autograd.grad(fusedattn.layer_norm(part, 8), part, spread(dout, at))
        torch.testing.assert_close(whole(found), want)


def statistics_in_one_dimension() -> None:
    """As many rows of one batch as a process has of all: they are not taken for those."""
    x, dout, f64 = normal(4, 4, 8), normal(4, 4, 8), torch.float64
    options = (None, 1, f64, None, None, None, "auto", False, 1e-5, 0.0, 0.0)
    rstd = normal(16)
    want = torch.ops.fusedattn.norm_bwd(dout, None, x, None, None, rstd, *options)[0]
    found = torch.ops.fusedattn.norm_bwd(
        spread(dout, S1), None, spread(x, S1), None, None, spread(rstd, S0), *options
    )[0]
    assert torch.equal(whole(found), want)


def forward_mode() -> None:
    """Along the batch, and along heads, where tangents lie as what they belong to."""
    for at, bias in ((S0, R), (S1, S1)):
        made = {name: x for name, (x, *_) in inputs(at, 2).items()}
        made |= {f"t_{name}": x.cos() for name, x in made.items()}
        parts = {name: spread(x, at) for name, x in made.items()}
        for name in ("bias", "t_bias"):
            made[name] = normal(1, 4, 5, 6)
            parts[name] = spread(made[name], bias)
        options = {"causal": 1, "scale": 0.3}
        want = torch.ops.fusedattn.attention_jvp(**made, **options)
        for x, y in zip(torch.ops.fusedattn.attention_jvp(**parts, **options), want, strict=True):
            assert x.placements == (at,)
            assert torch.equal(whole(x), y)


def mixed(op: str, name: str) -> None:
    """One DTensor among tensors, and one tensor among DTensors, with and without gradients."""
    call = OPS[op]
    tensors = call.tensors(torch.float32)
    parts = {n: spread(x, R) for n, x in tensors.items()}
    for given in (tensors | {name: parts[name]}, parts | {name: tensors[name]}):
        for grad in (False, True):
            first = {call.differentiable[0]: given[call.differentiable[0]].requires_grad_(grad)}
            with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
                call.run(**given | first)


def refused() -> None:
    q, table = spread(normal(2, 2, 4, 8), S0), spread(normal(4, 4), R)
    for x in (q, q.clone().requires_grad_() * 1):
        with pytest.raises(NotImplementedError, match=r"fusedattn\.rotary_\.default does not have"):
            fusedattn.apply_rotary(x, table, table, inplace=True)
    for norm in (fusedattn.layer_norm, fusedattn.rms_norm):
        with pytest.raises(NotImplementedError, match=r"got dropout_p=0\.5 with a DTensor"):
            norm(q, 8, dropout_p=0.5, seed=1)
    for x in (q, q.clone().requires_grad_()):
        with pytest.raises(NotImplementedError, match=r"attention: got dropout_p=0\.5 with a DTen"):
            fusedattn.attention(x, x, x, dropout_p=0.5, seed=1)


def same_training(module: Any, parallel: Any, x: torch.Tensor, given: Any, **options: Any) -> None:
    """`parallel`, of which `given` is the input, and `module` find one output and gradients."""
    want, found = outputs(module(x, **options))[0], outputs(parallel(given, **options))[0]
    want.square().sum().backward()
    loss = found.square().sum()
    loss.backward()
    torch.testing.assert_close(whole(found), want)
    for (name, a), (_, b) in zip(
        parallel.named_parameters(), module.named_parameters(), strict=True
    ):
        torch.testing.assert_close(whole(a.grad), b.grad, msg=lambda text, n=name: f"{n}: {text}")


def sequence_parallel() -> None:
    mesh, x = init_device_mesh("cpu", (PROCESSES,)), normal(2, 4, 8)
    for kind in (fusedattn.nn.LayerNorm, fusedattn.nn.RMSNorm):
        module = kind(8, dtype=torch.float64)
        parallel = parallelize_module(copy.deepcopy(module), mesh, SequenceParallel())
        same_training(module, parallel, x, spread(x, S1))


class Block(torch.nn.Module):
    """Rotary attention between its projections, as models with tensor parallelism have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fusedattn.nn.RMSNorm(16)
        self.q, self.k, self.v = (torch.nn.Linear(16, n, bias=False) for n in (32, 16, 16))
        self.o = torch.nn.Linear(32, 16, bias=False)
        self.double()
        self.register_buffer("table", torch.linspace(0.1, 0.9, 12).double().view(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        table = self.table
        if isinstance(q, DTensor):
            table = DTensor.from_local(table, q.device_mesh, [R], run_check=False)
        q, k = fusedattn.apply_rotary_qk(q, k, table, table)
        return self.o(fusedattn.attention(q, k, v, causal=True).transpose(1, 2).flatten(-2))


def tensor_parallel() -> None:
    """Colwise and rowwise projections, attention on DTensors between them."""
    mesh, x, module = init_device_mesh("cpu", (PROCESSES,)), normal(2, 6, 16), Block()
    colwise = {"input_layouts": R, "use_local_output": False}
    plan = {name: ColwiseParallel(**colwise) for name in ("q", "k", "v")}
    plan["o"] = RowwiseParallel()
    parallel = parallelize_module(copy.deepcopy(module), mesh, plan)
    same_training(module, parallel, x, x)


def multihead_attention() -> None:
    """Spread over the batch; with its output projection in columns, which torch's own is not."""
    mesh, x = init_device_mesh("cpu", (PROCESSES,)), normal(2, 5, 16)
    module = fusedattn.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)

    class Own(torch.nn.Module):
        def __init__(self, attend: Any) -> None:
            super().__init__()
            self.attend = attend

        def forward(self, x: Any) -> Any:
            return self.attend(x, x, x, need_weights=False)

    alone = Own(module)
    same_training(alone, distribute_module(copy.deepcopy(alone), mesh), x, spread(x, S0))
    alone.zero_grad()
    plan = {"attend.out_proj": ColwiseParallel(output_layouts=R)}
    same_training(alone, parallelize_module(copy.deepcopy(alone), mesh, plan), x, x)


def fully_sharded() -> None:
    """Each process has the same batch: the mean of the gradients is the gradient."""
    module, x = Block(), normal(2, 6, 16)
    parallel = fully_shard(copy.deepcopy(module), mesh=init_device_mesh("cpu", (PROCESSES,)))
    same_training(module, parallel, x, x)


def checks() -> dict[str, Callable[[], None]]:
    return {
        "inference mode": inference_mode,  # of the first DTensor
        "gradient placed elsewhere": gradient_elsewhere,
        "statistics in one dimension": statistics_in_one_dimension,
        "forward mode": forward_mode,
        "refused": refused,
        **{name: lambda case=case: check_case(case) for name, case in cases().items()},
        **{f"mixed {op} {name}": lambda a=(op, name): mixed(*a) for op, name in MIXED},
        "sequence parallel": sequence_parallel,
        "tensor parallel": tensor_parallel,
        "multi-head attention": multihead_attention,
        "fully sharded": fully_sharded,
    }


# A tensor of one element is one number to everybody, to torch.
MIXED = [
    (op, name)
    for op, name in arguments()
    if name != "offset" and len(OPS[op].tensors(torch.float32)) > 1
]


def work(rank: int, folder: str) -> None:
    """Every check; how each went goes into a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    went = {"loaded": "fusedattn.distributed.sharding" in sys.modules}
    for name, check in checks().items():
        try:
            check()
            went[name] = ""
        except BaseException:
            went[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(went))
    dist.destroy_process_group()


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def went(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", checks())
def test_dtensor(went, name):
    for rank, each in enumerate(went):
        assert not each[name], f"process {rank}\n{each[name]}"


def test_rules_wait_for_the_first_dtensor(went):
    assert not any(each["loaded"] for each in went)


def block(q: Any, k: Any, weight: Any) -> Any:
    return fusedattn.attention(fusedattn.rms_norm(q, 8, weight), k, k, causal=True)


def test_compile():
    """One of two processes, with nobody to talk to: the first half of the heads.

    It is the first DTensor of this process, and in inference mode.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plain = [normal(2, 4, 5, 8), normal(2, 2, 5, 8), normal(8)]
    local = [x.chunk(2, 1)[0] if x.dim() == 4 else x for x in plain]
    at = [S1, S1, R]
    parts = [DTensor.from_local(x, mesh, [y]) for x, y in zip(local, at, strict=True)]
    run = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(run(*parts).to_local(), block(*local))
    found, want = (f(*(x.requires_grad_() for x in xs)) for f, xs in ((run, parts), (block, local)))
    assert found.placements == (S1,)
    assert torch.equal(found.to_local(), want)
    grads = torch.autograd.grad(found.sum(), parts)
    for x, y in zip(grads, torch.autograd.grad(want.sum(), local), strict=True):
        assert torch.equal(x.to_local(), y)
    assert [x.placements for x in grads] == [(S1,), (S1,), (P,)]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mesh", "heads", "ways"),
    [((8, 2), 2, "bh"), ((2, 2), 6, "b"), ((8, 2), 12, "b"), ((2, 2), 1, "bh"), ((3, 2), 12, "bh")],
)
def test_groups_of_heads_on_meshes(mesh, heads, ways):
    """No mesh dimensions that heads fit into leave a process without the keys of its queries."""
    from fusedattn.distributed.sharding import _attention_ways

    q, k = (SimpleNamespace(shape=(4, n), mesh=SimpleNamespace(shape=mesh)) for n in (24, heads))
    assert "".join(_attention_ways(q, k)) == ways
