"""What attention makes of bad arguments, and of empty tensors."""

from __future__ import annotations

import inspect
import re

import fusedattn
import pytest
import torch
from compare import device_for
from fusedattn.ops import _spellings, attention_backends
from fusedattn.ops.attention_config import AttentionCall, configure
from processes import in_a_new_process

pytestmark = pytest.mark.backends("fast", "cuda_emulated")

Q, K, V = (2, 4, 6, 8), (2, 2, 10, 8), (2, 2, 10, 5)


def call(q=Q, k=K, v=V, *, dtype=torch.float32, **options):
    q, k, v = (torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x for x in (q, k, v))
    return fusedattn.attention(q, k, v, **options)


FLOAT = torch.float32


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# What is passed, the error, and what its message names: argument, what was got, what is expected.
BAD = {
    "q is a list": ({"q": [1.0]}, TypeError, ["q of type list", "a dense float32, bf"]),
    "v is None": ({"v": None}, TypeError, ["v of type NoneType", "a dense float32, bf"]),
    "q of rank 2": ({"q": (6, 8)}, ValueError, ["q of shape (6, 8)", "expected 3 dimensions or"]),
    "k of rank 5": ({"k": (3, 3, *K[1:])}, ValueError, ["dimensions (2,), (3, 3), (2,) of q"]),
    "v of rank 2": ({"v": (10, 5)}, ValueError, ["v of shape (10, 5)", "expected 3 dimensions or"]),
    "integers": ({"dtype": torch.int32}, TypeError, ["q of dtype torch.int32", "float64"]),
    "complex": ({"dtype": torch.complex64}, TypeError, ["complex64", "float64 tensor"]),
    "k of another dtype": (
        {"k": of(torch.bfloat16, *K)},
        TypeError,
        ["q, k, v of dtypes torch.float32, torch.bfloat16, torch.float32", "expected one dtype"],
    ),
    "v of another device": (
        {"v": torch.zeros(V, device="meta")},
        ValueError,
        ["q, k, v on devices cpu, cpu, meta", "expected one device"],
    ),
    "batch of k": ({"k": (3, *K[1:])}, ValueError, ["batch sizes 2, 3, 2 of q, k, v", "expected"]),
    "batch of v": ({"v": (4, *V[1:])}, ValueError, ["batch sizes 2, 2, 4 of q, k, v", "expected"]),
    "length of v": ({"v": (2, 2, 9, 5)}, ValueError, ["v of shape (2, 2, 9, 5)", "(2, 2, 10)"]),
    "heads of v": ({"v": (2, 4, 10, 5)}, ValueError, ["v of shape (2, 4, 10, 5)", "(2, 2, 10)"]),
    "head dim of k": ({"k": (2, 2, 10, 7)}, ValueError, ["head dims 8 of q and 7 of k"]),
    "head dim 0": ({"q": (2, 4, 6, 0), "k": (2, 2, 10, 0)}, ValueError, ["head dims 0", "least 1"]),
    "head dim of v 0": ({"v": (2, 2, 10, 0)}, ValueError, ["v of shape (2, 2, 10, 0)", "least 1"]),
    "heads 3 over 2": ({"q": (2, 3, 6, 8)}, ValueError, ["3 query heads", "2 key heads", "multip"]),
    "heads 33 over 2": ({"q": (2, 33, 6, 8)}, ValueError, ["33 query heads", "2 key", "multiple"]),
    "heads 1 over 2": ({"q": (2, 1, 6, 8)}, ValueError, ["1 query heads", "2 key", "multiple"]),
    "no key heads": (
        {"k": (2, 0, 10, 8), "v": (2, 0, 10, 5)},
        ValueError,
        ["4 query heads", "0 key heads", "multiple"],
    ),
    "mask longer than the keys": (
        {"mask": of(torch.bool, 6, 20)},
        ValueError,
        ["mask of shape (6, 20)", "broadcasts to (B, Hq, Sq, Sk) = (2, 4, 6, 10)"],
    ),
    "mask of the wrong batch": (
        {"mask": of(torch.bool, 3, 1, 6, 10)},
        ValueError,
        ["mask of shape (3, 1, 6, 10)", "(2, 4, 6, 10)"],
    ),
    "mask of keys": (
        {"mask": of(torch.bool, 2, 10)},
        ValueError,
        ["mask of shape (2, 10)", "(2, 4, 6, 10); one of keys, (B, Sk), is passed as its [:, None"],
    ),
    "mask of each batch entry": (
        {"mask": of(torch.bool, 2, 6, 10)},
        ValueError,
        ["mask of shape (2, 6, 10)", "; one for all heads, (B, Sq, Sk), is passed as its [:, Non"],
    ),
    "bias for (B, S, H, D)": (
        {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8), "bias": of(FLOAT, 2, 1, 6, 6)},
        ValueError,
        ["(2, 6, 4, 2); q, k and v that lie (B, S, H, D) are passed as their .transpose(1, 2)"],
    ),
    "keys (B, S, H, D)": (
        {"q": (2, 6, 4, 8), "k": (2, 10, 2, 8), "v": (2, 10, 2, 5)},
        ValueError,
        ["6 query heads and 10 key heads", "multiple (grouped queries); q, k and v that lie (B, S"],
    ),
    "mask of rank 5": ({"mask": of(torch.bool, 1, 1, 1, 6, 10)}, ValueError, ["mask", "(B, Hq"]),
    "float mask": ({"mask": of(torch.float32, 6, 10)}, TypeError, ["mask", "float32", "as bias"]),
    "uint8 mask": ({"mask": of(torch.uint8, 6, 10)}, TypeError, ["mask", "uint8", "dense bool"]),
    "mask is a list": ({"mask": [[True]]}, TypeError, ["mask of type list", "a dense bool"]),
    "mask of another device": (
        {"mask": torch.ones(6, 10, dtype=torch.bool, device="meta")},
        ValueError,
        ["mask on meta", "the device of q, cpu"],
    ),
    "bias does not broadcast": (
        {"bias": of(torch.float32, 2, 2, 6, 10)},
        ValueError,
        ["bias of shape (2, 2, 6, 10)", "(2, 4, 6, 10)"],
    ),
    "bool bias": ({"bias": of(torch.bool, 6, 10)}, TypeError, ["bias", "torch.bool", "float32"]),
    "integer bias": ({"bias": of(torch.uint8, 6, 10)}, TypeError, ["bias", "uint8", "float32"]),
    "half bias of float32 queries": (
        {"bias": of(torch.float16, 6, 10)},
        TypeError,
        ["bias", "torch.float16", "expected a dense float32 tensor"],
    ),
    "bias is a float": ({"bias": 1.0}, TypeError, ["bias of type float", "a dense float32"]),
    "bias of another device": (
        {"bias": torch.zeros(6, 10, device="meta")},
        ValueError,
        ["bias on meta", "the device of q, cpu"],
    ),
    "kv_lengths of floats": ({"kv_lengths": of(torch.float32, 2)}, TypeError, ["float32", "int32"]),
    "kv_lengths is a list": ({"kv_lengths": [1, 2]}, TypeError, ["type list", "int32"]),
    "kv_lengths of the wrong size": (
        {"kv_lengths": of(torch.int32, 3)},
        ValueError,
        ["kv_lengths of shape (3,)", "expected (2,)"],
    ),
    "kv_lengths per head": ({"kv_lengths": of(torch.int32, 2, 4)}, ValueError, ["(2, 4)", "(2,)"]),
    "causal misspelt": ({"causal": "lower"}, ValueError, ["causal='lower'", "'top_left'"]),
    "scale is a string": ({"scale": "1"}, TypeError, ["scale of type str", "expected a float"]),
    "alibi_slopes of other heads": (
        {"alibi_slopes": of(FLOAT, 3)},
        ValueError,
        ["alibi_slopes of shape (3,)", "(Hq,) = (4,)"],
    ),
    "alibi_slopes of other batches": (
        {"alibi_slopes": of(FLOAT, 3, 4)},
        ValueError,
        ["(3, 4)", "(B, Hq) = (2, 4)"],
    ),
    "alibi_slopes, int": (
        {"alibi_slopes": of(torch.int64, 4)},
        TypeError,
        ["alibi_slopes", "int64"],
    ),
    "sinks of other heads": ({"sinks": of(FLOAT, 5)}, ValueError, ["sinks of shape (5,)", "(4,)"]),
    "sinks per batch": ({"sinks": of(FLOAT, 2, 4)}, ValueError, ["sinks of shape (2, 4)"]),
    "sinks, no tensor": ({"sinks": [0.0] * 4}, TypeError, ["sinks", "list"]),
    "window negative": ({"window": (-2, 0)}, ValueError, ["window=(-2, 0)", "expected"]),
    "softcap past float32": ({"softcap": 1e39}, ValueError, ["softcap=1e+39", "1e-30 to 1e30"]),
    "softcap negative": ({"softcap": -1.0}, ValueError, ["softcap=-1.0", "expected"]),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, ["dropout_p=-0.1", "0 <= dropout_p"]),
    "dropout above one": ({"dropout_p": 1.5}, ValueError, ["dropout_p=1.5", "0 <= dropout_p <= 1"]),
    "seed of too many bits": ({"seed": 2**63}, ValueError, ["seed of 64 bits"]),
    "seed, float": ({"dropout_p": 0.5, "seed": 1.0}, TypeError, ["seed of type float"]),
    "seeds": ({"dropout_p": 0.5, "seed": of(torch.int64, 2)}, ValueError, ["seed of shape (2,)"]),
    "seed, float tensor": ({"seed": of(FLOAT, 1)}, TypeError, ["seed of dtype"]),
    "dropout NaN": ({"dropout_p": float("nan")}, ValueError, ["dropout_p=nan", "0 <= dropout_p"]),
    "unknown backend": ({"backend": "cuda9"}, ValueError, ["backend='cuda9'", "'auto'", "'cpu'"]),
    "backend is None": ({"backend": None}, ValueError, ["backend of type None", "'auto'"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "parts"), BAD.values(), ids=BAD)
def test_bad_argument(options, error, parts):
    with pytest.raises(error, match=r"^attention: got ") as raised:
        call(**options)
    for part in parts:
        assert part in str(raised.value)


OTHERS = [
    (op, name)
    for op in ("attention", "attention_varlen", "attention_decode")
    for name in _spellings.spellings(op)
]


@pytest.mark.parametrize(("op", "name"), OTHERS, ids=lambda x: x)
def test_what_others_call_it(op, name):
    """The error says what stands here for it, and that is an argument."""
    q, offsets = torch.zeros(1, 1, 1, 8), torch.tensor([0, 1])
    given = {"attention": (q,) * 3, "attention_varlen": (q[0],) * 3}.get(op, (q, q, q, offsets[:1]))
    packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets} if op == "attention_varlen" else {}
    function = getattr(fusedattn, op)
    with pytest.raises(TypeError, match=rf"^{op}: got {name}, expected ") as raised:
        function(*given, **packed, **{name: True})
    known = inspect.signature(function).parameters
    words = set(re.findall(r"\w+", str(raised.value).split("expected ")[1])) - {name}
    assert name not in known
    nothing = name in ("enable_gqa", "num_splits") or name.startswith("dropout")
    elsewhere = words & set(fusedattn.__all__)
    assert words & known.keys() or nothing or elsewhere
    with pytest.raises(TypeError, match=f"{op}: got an unknown keyword argument 'masks'"):
        function(*given, **packed, masks=None)


@pytest.mark.parametrize("wrong", ["q", "k_cache"])
def test_a_layout_of_others_in_a_cache(wrong):
    """(B, S, H, D), in a call of which all else fits."""
    given = {"q": torch.zeros(2, 4, 1, 8), "k_cache": torch.zeros(2, 4, 64, 8)}
    given["v_cache"] = given["k_cache"]
    for name in (wrong, "v_cache") if wrong == "k_cache" else ("q",):
        given[name] = given[name].transpose(1, 2)
    with pytest.raises(ValueError, match=r"heads.*are passed as their \.transpose\(1, 2\)"):
        fusedattn.attention_decode(**given, lengths=torch.tensor([1, 2]))
    offsets = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"got q of shape .*; a batch .* goes to attention"):
        fusedattn.attention_varlen(*[given["q"]] * 3, cu_seqlens_q=offsets, cu_seqlens_k=offsets)


def test_what_others_mean_by_it():
    """The advice computes what torch does."""
    q, k, v = torch.randn(Q), torch.randn(K), torch.randn(K)
    theirs = torch.nn.functional.scaled_dot_product_attention
    expected = theirs(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(fusedattn.attention(q, k, v, causal="top_left"), expected)
    blocked = torch.arange(10) >= torch.tensor([[10], [7]])
    expected = theirs(q, k, v, ~blocked[:, None, None, :], enable_gqa=True)
    for options in ({"mask": ~blocked[:, None, None, :]}, {"kv_lengths": torch.tensor([10, 7])}):
        torch.testing.assert_close(fusedattn.attention(q, k, v, **options), expected)


def test_option_that_a_backend_does_not_take():
    """The error lists every backend with its reason and the remedy."""
    with pytest.raises(fusedattn.UnsupportedError) as raised:
        call(dropout_p=0.1, backend="cuda")
    for backend in ("cuda", "triton", "cuda_emulated"):
        assert re.search(rf"^  {backend}: .+; .+$", str(raised.value), re.MULTILINE)
    q, k = of(torch.float16, *Q), of(torch.float16, *K)
    given = AttentionCall(q, k, k, mask=of(torch.bool, 1, 1, 1, 1), config=configure(8))
    refusal = attention_backends._cuda_takes(given)
    assert refusal.reason == "mask is not supported"
    assert refusal.remedy == "leave mask out, or use causal, window and kv_lengths"


@pytest.mark.parametrize("options", [{"softcap": None}, {"window": (None, None)}, {"dropout_p": 0}])
def test_option_that_is_off(options):
    assert torch.equal(call(**options), call())


def test_nothing_is_launched_and_nothing_is_written_on_error():
    q = torch.ones(Q, requires_grad=True)
    with pytest.raises(ValueError, match="mask"):
        call(q=q, mask=of(torch.bool, 6, 20))
    assert q.grad is None
    assert q._version == 0


EMPTY = {
    "no batch": ((0, 4, 6, 8), (0, 2, 10, 8), (0, 2, 10, 5)),
    "no heads": ((2, 0, 6, 8), (2, 0, 10, 8), (2, 0, 10, 5)),
    "no queries": ((2, 4, 0, 8), K, V),
    "no keys": (Q, (2, 2, 0, 8), (2, 2, 0, 5)),
    "nothing, odd dims": ((7, 9, 0, 7), (7, 9, 0, 7), (7, 9, 0, 7)),
    "no keys, odd dims": ((7, 9, 3, 7), (7, 9, 0, 7), (7, 9, 0, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_empty(shapes, causal, dtype, backend):
    device = device_for(backend)
    q, k, v = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)
    bias = torch.zeros(q.shape[1], 1, k.shape[2], device=device, requires_grad=True)
    out, lse = fusedattn.attention(
        q, k, v, bias=bias, causal=causal, return_lse=True, backend=backend
    )
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == q.shape[:3]
    assert out.dtype == dtype
    assert torch.equal(out, torch.zeros_like(out))
    if k.shape[2] == 0:
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    out.sum().backward()
    for leaf in (q, k, v, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_empty_tensors_do_not_kill_the_process():
    """pytorch#141218: a division by a zero size ends the interpreter, not the test."""
    code = (
        "import torch, fusedattn\n"
        "for shape in ((7, 9, 0, 7), (7, 7, 0, 7), (0, 1, 1, 1), (1, 0, 5, 3)):\n"
        "    q, k, v = (torch.zeros(shape, dtype=torch.half, requires_grad=True) for _ in 'qkv')\n"
        "    fusedattn.attention(q, k, v, causal=True).sum().backward()\n"
        "print('alive')"
    )
    assert in_a_new_process(code) == "alive"
