"""Modules in the hands of torch's tools: torch.fx, parametrizations, pruning, meta, FSDP2, export.

What each does to a replaced model is held to what it does to the model before.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import fusedattn
import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

E, H = 16, 4

pytestmark = [
    pytest.mark.usefixtures("fp64_on_one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # in torch's, under vmap
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view"),  # torch's too
]


class Net(nn.Module):
    """One of everything that `replace` swaps, with an input that training and evaluation share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(E, E), nn.LayerNorm(E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.cross = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
        self.rms, self.softmax = nn.RMSNorm(E, eps=1e-6), nn.Softmax(-1)

    def forward(self, x):  # a graph with annotations that are strings does not pickle
        y = self.norm(self.linear(x))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        out, weights = self.cross(y, key=x, value=x)
        return self.softmax(self.rms(y + out)) + weights.sum(-1, keepdim=True)


def twins() -> tuple[Net, Net, fusedattn.Replacement]:
    theirs = Net().eval()
    ours = copy.deepcopy(theirs)
    return theirs, ours, fusedattn.replace(ours)


def check(ours: Callable[[Tensor], Tensor], theirs: Net, gradients: bool = True) -> None:
    x = torch.randn(2, 5, E)
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_(gradients)
        out = model(leaf)
        if gradients:
            out.square().sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results)


def test_fx_traces_modules_as_nodes() -> None:
    theirs, ours, _ = twins()
    graph, expected = (torch.fx.symbolic_trace(model) for model in (ours, theirs))
    nodes = [[(node.op, node.target) for node in g.graph.nodes] for g in (graph, expected)]
    assert nodes[0] == nodes[1]
    assert graph.state_dict().keys() == theirs.state_dict().keys()
    for twin in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert type(twin.norm) is fusedattn.nn.LayerNorm
        check(twin, theirs)
    assert all(parameter.grad is not None for parameter in ours.parameters())
    graph.train()  # decides when it runs, not when it was traced
    x = torch.randn(2, 5, E)
    assert not torch.equal(graph(x), graph(x))


class Twice(fusedattn.nn.LayerNorm):
    def forward(self, x):
        return super().forward(2 * x)


def wrapped(module: nn.Module) -> nn.Module:
    module.forward = functools.partial(module.forward)  # as accelerate does
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: 2 * out)
    return module


SURROUNDED = {
    "root": lambda: fusedattn.nn.RMSNorm(E),
    "subclass": lambda: nn.Sequential(Twice(E)),
    "wrapped": lambda: nn.Sequential(wrapped(fusedattn.nn.LayerNorm(E))),
    "hooked": lambda: nn.Sequential(hooked(fusedattn.nn.Softmax(-1))),
}


@pytest.mark.parametrize("name", SURROUNDED)
def test_fx_traces_into_what_a_node_would_repeat(name: str) -> None:
    model, x = SURROUNDED[name](), torch.randn(2, 5, E)
    graph = torch.fx.symbolic_trace(model)
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    assert torch.equal(graph(x), model(x))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotary = fusedattn.nn.RotaryEmbedding(E)
        self.sinusoidal = fusedattn.nn.SinusoidalPositionalEncoding()
        self.learned = fusedattn.nn.LearnedPositionalEncoding(9, E)
        self.norm = fusedattn.nn.LayerNorm(E)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.rotary(x, x + 1, positions=positions)
        y, stream = self.norm(self.learned(q, positions=positions), self.sinusoidal(k, offset=2))
        return y + stream


def test_fx_traces_positions() -> None:
    model, x, positions = Positions(), torch.randn(2, 5, E), torch.tensor([3, 1, 0, 4, 8])
    graph = torch.fx.symbolic_trace(model)
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert nodes == ["rotary", "learned", "sinusoidal", "norm"]
    assert torch.equal(graph(x, positions), model(x, positions))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: Net) -> None:
    for module, name in ((model.norm, "weight"), (model.rms, "weight")):
        parametrize.register_parametrization(module, name, Double())
    parametrizations.weight_norm(model.attention, "in_proj_weight")
    parametrizations.weight_norm(model.cross.out_proj)


def weight_normed(model: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and much in use
        nn.utils.weight_norm(model.attention, "in_proj_weight")


def pruned(model: Net) -> None:
    for module in (model.norm, model.rms):
        prune.l1_unstructured(module, "weight", 0.5)
    prune.l1_unstructured(model.attention, "in_proj_weight", 0.5)


@pytest.mark.parametrize("change", [parametrized, weight_normed, pruned])
@pytest.mark.filterwarnings("ignore:Replacement.undo. left as they are")
def test_weights_that_are_computed(change: Callable[[Net], None]) -> None:
    theirs, ours, done = twins()
    for model in (theirs, ours):
        change(model)
    check(ours, theirs)
    done.undo()
    check(ours, theirs)


def test_meta_and_assigned_weights() -> None:
    with torch.device("meta"):
        ours = Net().eval()
        positions = Positions()
    fusedattn.replace(ours)
    assert ours(torch.empty(2, 5, E, device="meta")).shape == (2, 5, E)
    theirs = Net().eval()
    assigned = copy.deepcopy(ours)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    for model in (ours, assigned):
        check(model, theirs)
    source = Positions()
    positions.to_empty(device="cpu").load_state_dict(source.state_dict())
    x, rows = torch.randn(2, 5, E), torch.arange(5)
    assert torch.equal(positions(x, rows), source(x, rows))


def test_functional_calls() -> None:
    """`functional_call`, per-sample gradients, and a batch of models."""
    theirs, ours, _ = twins()
    x, weights = torch.randn(2, 5, E), {n: p.detach() for n, p in ours.named_parameters()}

    def loss(model: Net, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0))
    torch.testing.assert_close(per_sample(ours, weights, x), per_sample(theirs, weights, x))
    models = {name: torch.stack([w, w.sin()]) for name, w in weights.items()}
    each = torch.func.vmap(loss, in_dims=(None, 0, None))
    torch.testing.assert_close(each(ours, models, x[0]), each(theirs, models, x[0]))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    theirs, ours, _ = twins()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        ours, (torch.randn(3, 5, E),), dynamic_shapes=({0: batch},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check(torch.export.load(file).module(), theirs, gradients=False)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_fully_sharded() -> None:
    """FSDP2 makes a class of its own for each module that it is given."""
    theirs, ours, done = twins()
    mesh = init_device_mesh("cpu", (1,))
    for module in (ours.norm, ours.attention, ours.rms, ours):
        fully_shard(module, mesh=mesh)
    check(ours, theirs)
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad)
    with pytest.warns(UserWarning, match=r"norm \(FSDPLayerNorm\), attention \(FSDPMultiheadAtt"):
        done.undo()
    assert type(ours.cross) is nn.MultiheadAttention
    check(ours, theirs)


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    theirs, ours, _ = twins()
    check(nn.parallel.DistributedDataParallel(ours), theirs)
