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
from processes import in_a_new_process
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = {
    "attention": lambda x: fusedattn.attention(x, x, x),
    "layer_norm": lambda x: fusedattn.layer_norm(x, 8),
    "rms_norm": lambda x: fusedattn.rms_norm(x, 8, residual=x)[0],
    "softmax": lambda x: fusedattn.softmax(x),
    "apply_rotary": lambda x: fusedattn.apply_rotary(x, x.new_ones(5, 4), x.new_ones(5, 4)),
    "add_sinusoidal": lambda x: fusedattn.add_sinusoidal(x),
    "swiglu": lambda x: fusedattn.swiglu(x, x),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_what_a_transform_leaves_behind(op, grad):
    """A wrapper that outlives its transform has no storage of its own, but is a tensor still."""
    kept = []

    def loss(x):
        kept.append(x * 2)
        return kept[0].sum()

    x = torch.randn(1, 2, 5, 8)
    torch.func.grad(loss)(x)
    (left,) = kept
    given = (x * 2).requires_grad_()
    with torch.set_grad_enabled(grad):
        found, want = OPS[op](left), OPS[op](given)
    torch.testing.assert_close(found.detach(), want.detach())


@pytest.mark.parametrize("op", OPS)
def test_empty_tensors(op):
    x = torch.randn(0, 2, 5, 8, requires_grad=True)
    out = OPS[op](x)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_default_device_is_for_new_tensors(op, grad):
    """What an op allocates lies where its inputs do."""
    found = []
    for device in ("cpu", "meta"):
        x = torch.linspace(-1, 1, 80, device="cpu").view(1, 2, 5, 8).requires_grad_(grad)
        with torch.device(device):
            out = OPS[op](x)
            found.append((out, *torch.autograd.grad(out, x, x.detach())) if grad else (out,))
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
        x = torch.empty(1, 2, 5, 8, dtype=torch.bfloat16, device="cuda")
        out = torch.compile(OPS[op], fullgraph=True, backend=capture)(x)
    assert out.is_cuda
    (graph,) = graphs
    (call,) = (node for node in graph.graph.nodes if "fusedattn." in str(node.target))
    assert ("cuda" if built else "triton") in call.args


def _rotary_in_place(x):
    angles = torch.arange(20.0).view(5, 4)
    return fusedattn.apply_rotary(x * 2, angles.cos(), angles.sin(), inplace=True)


TRACED = [(name, op, grad) for name, op in OPS.items() for grad in (False, True)]
TRACED += [("in place", _rotary_in_place, False)]  # torch's trace takes no differentiable one


@pytest.mark.parametrize(("name", "op", "grad"), TRACED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_holds_the_op(name, op, grad):
    """Not the result of the inputs with which it was made."""
    x, y = torch.randn(2, 1, 2, 5, 8)
    traced = torch.jit.trace(op, (x.requires_grad_(grad),), check_trace=False)
    assert torch.equal(traced(y), op(y))


@pytest.mark.parametrize(
    "name", ["Attention", "LayerNorm", "RMSNorm", "Rotary", "Sinusoidal", "Softmax", "SwiGLU"]
)
def test_functions_refuse_transforms(name):
    """They have no rule for torch.func; its `apply` says so, and is theirs in public."""
    function = getattr(fusedattn.autograd, name)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: function.apply(x).sum())(torch.randn(3))


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
