"""attention as a citizen of torch: op checks, meta, autocast, checkpointing, FLOPs, threads."""

from __future__ import annotations

import threading
from functools import partial

import fusedattn
import pytest
import torch
from fusedattn.ops.attention_config import AttentionCall, AttentionConfig
from processes import in_a_new_process
from torch._subclasses import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

FORWARD, BACKWARD = (getattr(torch.ops.fusedattn, f"attention_{d}").default for d in ("fwd", "bwd"))


def heads_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch, heads, seq, dim = shape
    return torch.randn(batch, seq, heads, dim).to(dtype).transpose(1, 2)


OPERANDS = {
    "plain": lambda: [torch.randn(2, 2, 196, 8) for _ in "qkv"],
    "transposed, Dv, GQA, bf16": lambda: [
        heads_last(2, 4, 257, 16, dtype=torch.bfloat16),
        heads_last(2, 2, 131, 16, dtype=torch.bfloat16),
        torch.randn(2, 2, 131, 24).bfloat16(),
    ],
    "mask, bias, lengths": lambda: [
        torch.randn(2, 4, 33, 8)[..., ::2],
        torch.randn(1, 2, 20, 4).expand(2, 2, 20, 4),
        heads_last(2, 2, 20, 6),
        torch.rand(1, 1, 33, 20) < 0.7,
        torch.randn(1, 4, 20, 33).mT,
        torch.tensor([20, 7], dtype=torch.int32),
    ],
    "empty": lambda: [torch.randn(2, 2, 0, 8) for _ in "qkv"],
    "float64": lambda: [torch.randn(1, 2, 5, 3, dtype=torch.float64) for _ in "qkv"],
}


def forward_args(name: str, backend: str) -> list:
    return [*AttentionCall(*OPERANDS[name]())[:-1], backend, *AttentionConfig(2, 0.3)]


def backward_args(name: str, backend: str) -> list:
    args = forward_args(name, backend)
    out, lse = FORWARD(*args)
    bias_grad = args[4] is not None
    wanted = [bias_grad, *[False] * 4]
    return [torch.randn_like(out), torch.randn_like(lse), out, lse, *args, *wanted]


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize(("op", "args"), [(FORWARD, forward_args), (BACKWARD, backward_args)])
def test_opcheck(op, args, name, fast_backend):
    args = args(name, fast_backend)
    checks = torch.library.opcheck(op, args)
    assert set(checks.values()) == {"SUCCESS"}
    if op is BACKWARD:
        torch.library.opcheck(op, [None, *args[1:]])
        torch.library.opcheck(op, [args[0], None, *args[2:]])


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize(("op", "args"), [(FORWARD, forward_args), (BACKWARD, backward_args)])
def test_fake_has_the_strides_of_the_real(op, args, name, fast_backend):
    args = args(name, fast_backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for fake, real in zip(fakes, op(*args), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def mixed() -> dict[str, torch.Tensor]:
    """TransformerEngine's and diffusers' case: q and k in float32 after their norm, v in bf16."""
    x = {name: torch.randn(2, 2, 20, 16) for name in ("q", "k", "v")}
    x["v"] = x["v"].bfloat16()
    return {name: y.requires_grad_() for name, y in x.items()}


def test_mixed_dtypes_outside_autocast():
    with pytest.raises(TypeError, match=r"q, k, v of dtypes .*float32, .*float32, .*bfloat16"):
        fusedattn.attention(**mixed())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_of_them(dtype, fast_backend):
    x = mixed()
    bias = torch.randn(2, 20, 20, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = fusedattn.attention(**x, bias=bias, backend=fast_backend)
    assert out.dtype == dtype
    leaves = [*x.values(), bias]
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    cast = {name: y.to(dtype) for name, y in x.items()}
    want = fusedattn.attention(**cast, bias=bias, backend=fast_backend)
    assert torch.equal(out, want)
    for grad, wanted in zip(
        grads, torch.autograd.grad(want.float().square().sum(), leaves), strict=True
    ):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_takes_every_dtype_of_what_belongs_to_the_heads(dtype, fast_backend):
    """As it does of a bias: a model in bfloat16 may run in float16."""
    x = {name: torch.randn(2, 2, 20, 16) for name in ("q", "k", "v")}
    heads = {n: torch.rand(2, dtype=dtype, requires_grad=True) for n in ("alibi_slopes", "sinks")}
    with torch.autocast("cpu", torch.float16):
        out = fusedattn.attention(**x, **heads, backend=fast_backend)
    cast = {name: y.half() for name, y in x.items()}
    same = {name: y.float() for name, y in heads.items()}
    want = fusedattn.attention(**cast, **same, backend=fast_backend)
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.float().sum(), list(heads.values()))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    wanted = torch.autograd.grad(want.float().sum(), list(same.values()))
    for grad, other in zip(grads, wanted, strict=True):
        assert torch.equal(grad, other.to(dtype))


def test_raw_op_under_autocast():
    """The op's own rule: q, k and v are cast, but no float64, and a float32 bias is not."""
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    bias = torch.randn(1, 1, 6, 6)
    rest = {"bias": bias, "backend": "reference", "scale": 0.5}
    with torch.autocast("cpu", torch.bfloat16):
        found = FORWARD(q, k, v, **rest)
        in_64_bits = [x.double() for x in (q, k, v)]
        assert FORWARD(*in_64_bits, **rest | {"bias": bias.double()})[0].dtype == torch.float64
    want = FORWARD(q.bfloat16(), k.bfloat16(), v.bfloat16(), **rest)
    assert found[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_autocast_leaves_float64_alone(fast_backend):
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fusedattn.attention(q, k, v, backend=fast_backend).dtype == torch.float64


def gradients(function, leaves, **options) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, fast_backend):
    """pytorch#141896: recomputed under autocast, the gradients are the same bits."""
    leaves = [torch.randn(2, 2, 20, 16, requires_grad=True) for _ in "qkv"]
    attend = partial(fusedattn.attention, causal=True, backend=fast_backend)
    want = gradients(lambda *x: attend(*(2 * y for y in x)), leaves)

    def checkpointed(*x):
        return checkpoint(lambda *x: attend(*(2 * y for y in x)), *x, use_reentrant=use_reentrant)

    with torch.autocast("cpu", torch.bfloat16):
        out = checkpointed(*leaves)
    if use_reentrant:
        out.float().square().sum().backward()
        found = [out, *(leaf.grad for leaf in leaves)]
    else:
        found = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("save", [False, True])
def test_selective_checkpoint(save, fast_backend):
    """A policy sees the op by name, and decides whether it runs again in the backward."""
    runs = []

    def policy(context, op, *args, **kwargs):
        runs.append((op, context.is_recompute))
        keep = save and op is FORWARD
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return fusedattn.attention(2 * q, k, v, backend=fast_backend).sin()

    leaves = [torch.randn(2, 2, 20, 16, requires_grad=True) for _ in "qkv"]
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(block, *leaves, use_reentrant=False, context_fn=contexts)
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(out.sum(), leaves)
    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert (FORWARD, False) in runs
    again = counter.get_flop_counts()["Global"].get(FORWARD.overloadpacket, 0)
    assert (again == 0) == save


@pytest.mark.parametrize(("kv_heads", "dim_v"), [(4, 16), (1, 24)])
def test_flop_counter(kv_heads, dim_v, fast_backend):
    """As torch counts its own SDPA: all of Sq·Sk, causal or not; the backward remakes scores."""
    q = torch.randn(2, 4, 10, 16, requires_grad=True)
    k, v = torch.randn(2, kv_heads, 30, 16), torch.randn(2, kv_heads, 30, dim_v)
    shapes = (q.shape, (2, 4, 30, 16), (2, 4, 30, dim_v))
    with FlopCounterMode(display=False) as counter:
        out = fusedattn.attention(q, k, v, causal=True, backend=fast_backend)
    assert counter.get_total_flops() == flop_counter.sdpa_flop_count(*shapes)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == flop_counter.sdpa_backward_flop_count(out.shape, *shapes)


def test_flop_counter_at_first_use():
    """The counter copies the table of formulas when it is made: ours must be there by then."""
    code = (
        "import torch, fusedattn\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fusedattn.attention(*torch.randn(3, 1, 2, 8, 4))\n"
        "print(counter.get_total_flops())"
    )
    assert in_a_new_process(code) == str(2 * 2 * 8 * 8 * 8)


def test_import_is_light():
    """TransformerEngine#872: no CUDA context; nothing but torch is imported eagerly."""
    heavy = ("triton", "transformers", "matplotlib", "rich", "torch._dynamo", "torch._inductor")
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fusedattn\n"
        f"assert not torch.cuda.is_initialized()\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    assert in_a_new_process(code) == "[]"


def test_fork_after_use():
    """A data-loader worker, which runs torch on one thread, may call what its parent has called."""
    code = (
        "import os, torch, fusedattn\n"
        "q, k, v = torch.randn(3, 2, 2, 64, 32)\n"
        "want = fusedattn.attention(q, k, v)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    same = torch.allclose(fusedattn.attention(q, k, v), want, atol=1e-6)\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert in_a_new_process(code) == "0"


def test_threads_do_not_disturb_each_other(fast_backend):
    inputs = [[torch.randn(2, 4, 40 + i, 16, requires_grad=True) for _ in "qkv"] for i in range(4)]

    def run(q, k, v):
        out = fusedattn.attention(q, k, v, causal=True, backend=fast_backend)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    want = [run(*x) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(10):
            found = run(*inputs[index])
            if not all(map(torch.equal, found, want[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads(threads, fast_backend):
    """The split of the work changes with it, the result does not."""
    q, k, v = torch.randn(3, 1, 3, 200, 32)
    before = torch.get_num_threads()
    want = fusedattn.attention(q[:, :, :1], k, v, backend=fast_backend)
    try:
        torch.set_num_threads(threads)
        found = fusedattn.attention(q[:, :, :1], k, v, backend=fast_backend)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
