"""The versions of attention that stand beside each other in one case.

What can be prepared once (masks, sessions, compilation, layouts) is prepared by the builder; the
clock sees the call alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fusedattn
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .accuracy import Expected, expected_attention
from .attention_cases import Case, Problem
from .versions import FLASH, Builder, Outputs, Unavailable, Version, called_once, ours_on, refusal

Formula = Callable[..., Tensor]


def version_of(
    formula: Formula, problem: Problem, *contexts: Callable[[], Any], detail: str = ""
) -> Version:
    """A `Version` of a PyTorch function: forward, with the gradients of its inputs, or those alone.

    The last of each input set is the gradient of the output.

    For those alone the graphs are recorded here.
    """
    sets, backward, alone = problem.sets, problem.case.backward, problem.case.alone
    contexts = contexts if backward else (torch.no_grad, *contexts)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for enter in contexts:
                stack.enter_context(enter())
            yield

    leaves = [[x.detach().requires_grad_(backward) for x in s[:-1]] for s in sets]
    recorded: list[Tensor] = []
    if alone:
        with context():
            recorded = [formula(*inputs) for inputs in leaves]

    def call(i: int) -> Outputs:
        inputs, dout = leaves[i % len(sets)], sets[i % len(sets)][-1]
        out = recorded[i % len(sets)] if alone else formula(*inputs)
        if not backward:
            return (out,)
        return (out, *torch.autograd.grad(out, inputs, dout, retain_graph=alone))

    return Version(call, context, detail=detail)


# --- fusedattn and PyTorch -----------------------------------------------------------------------


def fused(problem: Problem) -> Version:
    """`fusedattn.attention`, on the backend that it picks itself."""
    causal = problem.case.causal

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fusedattn.attention(q, k, v, causal=causal)

    q, k, v, _ = problem.sets[0]
    backend = (
        fusedattn.explain(fusedattn.attention, q, k, v, causal=causal)
        .splitlines()[0]
        .split(": ")[-1]
    )
    if backend == "triton" and problem.device.type == "cpu":
        raise Unavailable("Triton's interpreter is for checking, its time says nothing")
    if backend == "reference":
        problem.refuse_huge_scores()
    return version_of(formula, problem, detail=backend)


def ours(backend: str) -> Builder:
    """fusedattn on one backend; "cpu" stands for what a CPU tensor gets by default."""
    if backend == "cpu":
        return fused

    def build(problem: Problem) -> Version:
        causal = problem.case.causal

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fusedattn.attention(q, k, v, causal=causal, backend=backend)

        try:
            formula(*problem.sets[0][:3])
        except fusedattn.UnsupportedError as error:
            raise Unavailable(refusal(error, backend)) from error
        return version_of(formula, problem, detail=backend)

    return build


def _eager_formula(problem: Problem) -> Formula:
    case = problem.case
    hidden = None
    if case.causal:
        ones = torch.ones(case.seq_q, case.seq_k, dtype=torch.bool, device=problem.device)
        hidden = ones.triu(1)
    scale = case.head_dim**-0.5

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, dim=-1) @ v

    return formula


def eager(problem: Problem) -> Version:
    """The formula in plain PyTorch."""
    problem.refuse_huge_scores()
    return version_of(_eager_formula(problem), problem)


def compiled(problem: Problem) -> Version:
    """`torch.compile` of eager, for these static shapes; compiled before the clock starts."""
    problem.refuse_huge_scores()
    formula = torch.compile(_eager_formula(problem), fullgraph=True, dynamic=False)
    return compiled_now(formula, problem)


def compiled_now(formula: Formula, problem: Problem) -> Version:
    """The version of what `torch.compile` gave, after its first call."""
    import torch._functorch.config as functorch

    torch.compiler.reset()
    # A backward that donates the buffers it was given can run only once.
    with functorch.patch(donated_buffer=not problem.case.alone):
        return called_once(version_of(formula, problem))


def sdpa(backend: SDPBackend) -> Builder:
    """`F.scaled_dot_product_attention`, forced to one backend."""

    def build(problem: Problem) -> Version:
        if backend == SDPBackend.MATH:
            problem.refuse_huge_scores()
        causal = problem.case.causal

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return version_of(formula, problem, lambda: sdpa_kernel(backend))

    return build


def flex(problem: Problem) -> Version:
    """FlexAttention, compiled; its block mask is made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = problem.case
    blocks = None
    if case.causal:
        blocks = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, case.seq_q, case.seq_k, device=problem.device
        )
    run = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, block_mask=blocks)

    return compiled_now(formula, problem)


# --- inference engines ---------------------------------------------------------------------------


def _require_engine(problem: Problem, module: str) -> None:
    if problem.case.backward:
        raise Unavailable(f"{module} has no backward")
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f'{module} is not installed: pip install "fusedattn[bench]"')


def onnxruntime(problem: Problem) -> Version:
    """ONNX Runtime's fused `MultiHeadAttention`, in fp32, with bound inputs and outputs.

    The op takes (B, S, H·D), and its flash path nothing else, so the layout is changed before the
    clock starts; only a decoding step is faster on keys and values of (B, H, S, D). The flash path
    knows no causal mask: causal attention stores all scores.
    """
    _require_engine(problem, "onnxruntime")
    if importlib.util.find_spec("onnx") is None:
        raise Unavailable('onnx is not installed: pip install "fusedattn[bench]"')
    if problem.case.dtype != "fp32":
        raise Unavailable("ONNX Runtime's MultiHeadAttention takes fp32 alone on a CPU")
    if problem.case.causal:
        problem.refuse_huge_scores()
    import numpy
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin between calls would take the cores from whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(
        _multi_head_attention(problem.case), options, providers=["CPUExecutionProvider"]
    )
    bound = []
    for *qkv, _ in problem.sets:
        flat = [x.transpose(1, 2).flatten(2).contiguous() for x in qkv]
        inputs = [flat[0], *qkv[1:]] if problem.case.bound_by_bytes else flat
        out = torch.empty_like(flat[0])
        binding = session.io_binding()
        for name, x in zip("qkv", inputs, strict=True):
            binding.bind_input(name, "cpu", 0, numpy.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output("out", "cpu", 0, numpy.float32, tuple(out.shape), out.data_ptr())
        bound.append((binding, inputs, out.unflatten(2, (problem.case.heads, -1)).transpose(1, 2)))

    def call(i: int) -> Outputs:
        binding, _, out = bound[i % len(bound)]
        session.run_with_iobinding(binding)
        return (out,)

    return Version(call, owns_arena=True)


def _multi_head_attention(case: Case) -> bytes:
    from onnx import TensorProto, helper

    queries = [case.batch, case.seq_q, case.heads * case.head_dim]
    keys = [case.batch, case.seq_k, case.heads * case.head_dim]
    if case.bound_by_bytes:
        keys = [case.batch, case.heads, case.seq_k, case.head_dim]
    shapes = {"q": queries, "k": keys, "v": keys, "out": queries}
    q, k, v, out = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=case.heads,
        unidirectional=int(case.causal),
    )
    graph = helper.make_graph([node], "attention", [q, k, v], [out])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def openvino(problem: Problem) -> Version:
    """OpenVINO's `ScaledDotProductAttention`, on the tensors' own memory and in their dtype."""
    _require_engine(problem, "openvino")
    import openvino as ov
    from openvino import opset13

    case = problem.case
    element, precision = {
        "fp32": (ov.Type.f32, "f32"),
        "bf16": (ov.Type.bf16, "bf16"),
        "fp16": (ov.Type.f16, "f16"),
    }[case.dtype]
    shapes = [
        [case.batch, case.heads, seq, case.head_dim] for seq in (case.seq_q, case.seq_k, case.seq_k)
    ]
    inputs = [opset13.parameter(shape, element) for shape in shapes]
    node = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = ov.Core().compile_model(ov.Model([node], inputs), "CPU", settings)

    def share(x: Tensor) -> ov.Tensor:
        array = x.view(torch.int16).numpy() if x.itemsize == 2 else x.numpy()
        return ov.Tensor(array, ov.Shape(list(x.shape)), element)

    requests = []
    for *qkv, _ in problem.sets:
        request = model.create_infer_request()
        out = torch.empty_like(qkv[0])
        shared = [share(x) for x in (*qkv, out)]
        for n, x in enumerate(shared[:3]):
            request.set_input_tensor(n, x)
        request.set_output_tensor(0, shared[3])
        requests.append((request, shared, out))

    def call(i: int) -> Outputs:
        request, _, out = requests[i % len(requests)]
        request.infer()
        return (out,)

    return Version(call, owns_arena=True)


PEERS: dict[str, Builder] = {
    "eager": eager,
    "torch.compile": compiled,
    FLASH: sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": sdpa(SDPBackend.MATH),
    "flex": flex,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
COMPILED = ("torch.compile", "flex")
_ELSEWHERE = {
    "cpu": ("sdpa-efficient", "sdpa-cudnn", "flex"),
    "cuda": ("onnxruntime", "openvino"),
}


def peers_on(device: torch.device) -> list[str]:
    """The names of the peers that a device can have (FlexAttention has no backward on a CPU)."""
    return [name for name in PEERS if name not in _ELSEWHERE[device.type]]


def builders(device: torch.device, names: Iterable[str]) -> dict[str, Builder]:
    """Our versions on a device, and the named peers."""
    mine = {name: ours(backend) for name, backend in ours_on(device).items()}
    return {**mine, **{name: PEERS[name] for name in names}}


def worth_compiling(name: str, case: Case, device: torch.device) -> bool:
    """Whether a version that is compiled stands beside this case without `thorough`."""
    on_gpu = device.type == "cuda"
    if case.dtype != ("bf16" if on_gpu else "fp32"):
        return False
    if on_gpu and name == "flex" and not case.bound_by_bytes:
        return True
    long = (case.seq_q, case.head_dim, case.causal) == (2048, 128, True)
    return case.regime == "BERT-like" or (long and (on_gpu or not case.backward))


def expected_of(problem: Problem, index: int, seed: int) -> Expected:
    """What every version should give on the input set of this index."""
    q, k, v, dout = problem.sets[index]
    case = problem.case
    return expected_attention(
        q, k, v, causal=case.causal, dout=dout if case.backward else None, seed=seed
    )
