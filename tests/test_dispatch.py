"""How a call reaches its kernel: what is not plain goes through torch's dispatcher."""

import inspect
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fusedattn
import pytest
import torch
from fusedattn import _native
from fusedattn.ops import _backends
from ops import OPS, arguments, few, outputs
from processes import in_a_new_process
from torch._subclasses.fake_tensor import FakeTensorMode


def of_first(op, **rest):
    """The op as a function of the first of the tensors that it needs."""
    first = OPS[op].needed[0]
    return lambda x: outputs(OPS[op].run(**few(op) | rest | {first: x}))[0]


def call_of(op):
    """The op as a function of that tensor, and the tensor."""
    made = few(op)
    x = made.pop(OPS[op].needed[0])
    return of_first(op, **made), x


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_what_a_transform_leaves_behind(op, grad):
    """A wrapper that outlives its transform has no storage of its own, but is a tensor still."""
    kept = []

    def loss(x):
        kept.append(x * 2)
        return kept[0].sum()

    run, x = call_of(op)
    torch.func.grad(loss)(x)
    (left,) = kept
    given = (x * 2).requires_grad_()
    with torch.set_grad_enabled(grad):
        found, want = run(left), run(given)
    torch.testing.assert_close(found.detach(), want.detach())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_default_device_is_for_new_tensors(op, grad):
    """What an op allocates lies where its inputs do."""
    (run, x), found = call_of(op), []
    for device in ("cpu", "meta"):
        x = x.detach().requires_grad_(grad)
        with torch.device(device):
            out = run(x)
            found.append((out, *torch.autograd.grad(out, x, out.detach())) if grad else (out,))
    for with_cpu, with_meta in zip(*found, strict=True):
        assert torch.equal(with_cpu, with_meta)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_call_on_a_gpu_compiles_whole(op, built, monkeypatch):
    """Which backend serves it is settled while dynamo traces, which cannot trace native code."""
    # runs_on is as native as that of the real one.
    module = SimpleNamespace(runs_on=sys.getrefcount, versions=lambda: (13000, 13000))
    monkeypatch.setattr(_native, "cuda", module if built else None)
    for cached in ("_mismatch", "_capability"):
        monkeypatch.setattr(_backends, cached, inspect.unwrap(getattr(_backends, cached)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        like = {"dtype": torch.bfloat16, "device": "cuda"}
        given = {name: torch.empty(x.shape, **like) for name, x in few(op).items()}
        out = outputs(torch.compile(OPS[op].run, fullgraph=True, backend=capture)(**given))[0]
    assert out.is_cuda
    (graph,) = graphs
    (call,) = (node for node in graph.graph.nodes if "fusedattn." in str(node.target))
    assert ("cuda" if built else "triton") in call.args


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_of_an_op_in_place():
    """Holds the op, not the result of the inputs with which it was made."""
    x, y = torch.randn(2, 1, 2, 5, 8)
    tables = torch.randn(2, 5, 4).unbind()

    def rotate(x):
        return fusedattn.apply_rotary(x * 2, *tables, inplace=True)

    traced = torch.jit.trace(rotate, (x,), check_trace=False)
    assert torch.equal(traced(y), rotate(y))


def lazily_negated(like):
    """A tensor that stands for the negative of its memory, as z.conj().imag does."""
    x = torch.randn(like.shape, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x


@pytest.mark.parametrize(("op", "name"), list(arguments()))
def test_negative_views(op, name):
    """Each argument in turn, and the gradient."""
    made = OPS[op].tensors(torch.float32)
    if not made[name].is_floating_point():
        return
    negative = lazily_negated(made[name])
    wanted, found = name in OPS[op].differentiable, []
    dense = negative.resolve_neg().clone()
    for x in (negative, dense):
        out = outputs(OPS[op].run(**made | {name: x.detach().requires_grad_(wanted)}))[0]
        found.append(out)
    assert torch.equal(*found)
    if wanted:
        for x in (negative, dense):
            x.requires_grad_()
        dout = lazily_negated(out)
        grads = [
            torch.autograd.grad(outputs(OPS[op].run(**made | {name: x}))[0], x, dy)[0]
            for x, dy in ((negative, dout), (dense, dout.resolve_neg().clone()))
        ]
        assert torch.equal(*grads)


def test_negative_views_are_rotated_in_place():
    x, tables = lazily_negated(torch.empty(1, 2, 6, 8)), torch.randn(2, 6, 4).unbind()
    want = fusedattn.apply_rotary(x, *tables)
    assert torch.equal(fusedattn.apply_rotary(x, *tables, inplace=True), want)
    assert torch.equal(x, want)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_inside_another_librarys_threads(tmp_path):
    """One thread of an OpenMP team calls, the others wait for it; our barriers are not theirs."""
    source, library = tmp_path / "team.cpp", tmp_path / "team.so"
    source.write_text(
        "#include <atomic>\n"
        "#include <omp.h>\n"
        'extern "C" int in_a_team(void (*body)()) {\n'
        "  std::atomic<int> done = 0, seen = 0;\n"
        "#pragma omp parallel num_threads(2)\n"
        "  {\n"
        "    if (omp_get_thread_num() == 0) body(), done = 1;\n"
        "#pragma omp barrier\n"
        "    seen += done;\n"
        "  }\n"
        "  return seen;\n"
        "}\n"
    )
    command = ["g++", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    code = (
        "import ctypes, torch, fusedattn\n"
        "x = torch.randn(1, 2, 300, 128, requires_grad=True)\n"
        "w = torch.ones(128, requires_grad=True)\n"
        "def run():\n"
        "    y = fusedattn.layer_norm(x, 128, w, residual=fusedattn.softmax(x))[0]\n"
        "    z = fusedattn.rms_norm(fusedattn.attention(y, y, y), 128, w)\n"
        "    return [z, *torch.autograd.grad(z.square().sum(), (x, w))]\n"
        "want, found = run(), []\n"
        "body = ctypes.CFUNCTYPE(None)(lambda: found.extend(run()))\n"
        f"seen = ctypes.CDLL({str(library)!r}).in_a_team(body)\n"
        "close = [torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, want)]\n"
        "print(seen, close)"
    )
    assert in_a_new_process(code) == "2 [True, True, True]"
