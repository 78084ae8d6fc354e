"""The choice of a backend: order, refusals, fallback warnings, strict()."""

from __future__ import annotations

import threading
import warnings

import fusedattn
import pytest
import torch
from fusedattn import _native
from fusedattn.ops import _registry
from fusedattn.ops._registry import Backend, Choice, Refusal
from ops import OPS


def never(call, requested):
    return Refusal("the moon is full", "wait a week")


def small(call, requested):
    return Refusal(f"{call} is above 10", "pass at most 10") if call > 10 else None


def always(call, requested):
    return None


def on_request(call, requested):
    return None if requested else Refusal("it is slow", 'ask for it with backend="slow"')


def make(**checks) -> Choice:
    return Choice("double", [Backend(name, check, dict) for name, check in checks.items()])


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(_registry, "_warned", set())


def test_first_that_accepts_is_chosen():
    op = make(gpu=never, cpu=small, reference=always)
    assert op.choose("auto", 5) == "cpu"
    with pytest.warns(UserWarning, match="falls back"):
        assert op.choose("auto", 50) == "reference"


def test_named_backend_is_chosen_or_refused():
    op = make(gpu=never, slow=on_request, cpu=small, reference=always)
    assert op.choose("cpu", 5) == "cpu"
    assert op.choose("slow", 5) == "slow"
    assert op.choose("auto", 5) == "cpu"
    with pytest.raises(fusedattn.UnsupportedError, match="backend 'cpu' does not take this call"):
        op.choose("cpu", 50)


def test_naming_the_reference_is_no_fallback():
    op = make(gpu=never, reference=always)
    with warnings.catch_warnings(), fusedattn.strict():
        warnings.simplefilter("error")
        assert op.choose("reference", 5) == "reference"


def test_refusal_lists_every_backend_with_reason_and_remedy():
    op = make(gpu=never, cpu=small, slow=on_request)
    with pytest.raises(fusedattn.UnsupportedError) as error:
        op.choose("auto", 50)
    assert str(error.value).splitlines() == [
        "double: no backend takes this call",
        "  gpu: the moon is full; wait a week",
        "  cpu: 50 is above 10; pass at most 10",
        '  slow: it is slow; ask for it with backend="slow"',
    ]


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"double: got backend='tpu', expected one of 'auto', 'cpu'"
    ):
        make(cpu=always).choose("tpu", 1)


def test_fallback_warns_once_per_reason():
    op = make(gpu=never, cpu=small, reference=always)
    with pytest.warns(UserWarning, match=r"double falls back to the slow reference .*50 is above"):
        op.choose("auto", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.choose("auto", 50)
    with pytest.warns(UserWarning, match="60 is above 10"):
        op.choose("auto", 60)


def test_fallback_warning_points_at_the_callers_line(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    x = torch.zeros(1, 2, 4, 8)
    layer = fusedattn.nn.MultiheadAttention(8, 2)

    def function():
        return fusedattn.attention(x, x, x)

    def module():
        return layer(x[0], x[0], x[0], need_weights=False)

    for call in (function, module):
        _registry._warned.clear()
        with pytest.warns(UserWarning, match="attention falls back") as caught:
            call()
        line = call.__code__.co_firstlineno + 1
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


def test_strict_forbids_the_fallback_and_nests():
    op = make(cpu=small, reference=always)
    with fusedattn.strict():
        assert op.choose("auto", 5) == "cpu"
        with pytest.raises(
            fusedattn.UnsupportedError, match=r"(?s)strict\(\) forbids.*50 is above"
        ):
            op.choose("auto", 50)
        with fusedattn.strict(False), pytest.warns(UserWarning, match="falls back"):
            assert op.choose("auto", 50) == "reference"
        with pytest.raises(fusedattn.UnsupportedError):
            op.choose("auto", 50)
    assert op.choose("auto", 50) == "reference"


def test_strict_ends_with_an_exception():
    op = make(cpu=small, reference=always)
    with pytest.raises(KeyError), fusedattn.strict():
        raise KeyError
    with pytest.warns(UserWarning, match="falls back"):
        op.choose("auto", 50)


def test_strict_holds_for_its_own_thread():
    op = make(cpu=small, reference=always)
    found = []

    def elsewhere():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(op.choose("auto", 50))

    with fusedattn.strict():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_kernels_are_loaded_on_first_use_and_once():
    loaded = []

    def load():
        loaded.append(1)
        return "kernels"

    op = Choice("double", [Backend("cpu", always, load), Backend("reference", always, load)])
    op.choose("auto", 1)
    assert not loaded
    assert op.kernels("cpu") == op.kernels("cpu") == "kernels"
    assert loaded == [1]


def test_explain():
    op = make(gpu=never, cpu=small, reference=always)
    assert op.explain("auto", 5).splitlines() == [
        "double: cpu",
        "  gpu: the moon is full; wait a week",
        "  cpu: takes it",
        "  reference: takes it",
    ]
    with warnings.catch_warnings(), fusedattn.strict():
        warnings.simplefilter("error")
        assert op.explain("auto", 50).startswith("double: reference\n")
    assert "backend 'gpu' does not take this call" in op.explain("gpu", 5)
    with pytest.raises(ValueError, match="tpu"):
        op.explain("tpu", 5)


@pytest.mark.parametrize("found", [False, True])
def test_explain_is_quiet_about_backends_of_other_machines(found, monkeypatch):
    """Where there is a GPU they are named; in errors, and when asked for, always."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)

    def elsewhere(call, requested):
        return Refusal("tensors are on cpu", "move them to a cuda device", "gpu")

    def emulator(call, requested):
        return None if requested else Refusal("an emulator", "ask for it", "tests")

    op = make(cpu=small, gpu=elsewhere, emulated=emulator, reference=always)
    told = op.explain("auto", 50).splitlines()
    assert told[:2] == ["double: reference", "  cpu: 50 is above 10; pass at most 10"]
    assert [line.split(":")[0].strip() for line in told[2:]] == ["gpu"] * found + ["reference"]
    assert "  emulated: takes it" in op.explain("emulated", 50)
    assert "  gpu: tensors are on cpu; move them to a cuda device" in op.explain("gpu", 50)
    with pytest.warns(UserWarning, match="falls back") as warned:
        op.choose("auto", 50)
    assert ("gpu: tensors" in str(warned[0].message)) == found


def test_explaining_does_not_use_up_the_warning():
    op = make(cpu=small, reference=always)
    op.explain("auto", 50)
    with pytest.warns(UserWarning, match="50 is above 10"):
        op.choose("auto", 50)


@pytest.mark.parametrize("op", OPS)
def test_every_op_explains_itself(op):
    """Nothing is run, and the fallback's warning is not used up."""
    call = OPS[op]
    given = call.tensors(torch.float64)
    with fusedattn.strict():
        lines = fusedattn.explain(call.run, **given).splitlines()
        assert lines[0] == f"{op}: cpu"
        names = [line.split(":")[0].strip() for line in lines[1:]]
        on_gpu = ["cuda"] if torch.cuda.is_available() else []
        assert names == ["cpu", *on_gpu, "triton", "reference"]  # Triton may be interpreted here
        on_triton = fusedattn.explain(call.run, **given, backend="triton")
        assert "triton: dtype is torch.float64" in on_triton
        named = fusedattn.explain(call.run, **given, backend="reference")
        assert named.startswith(f"{op}: reference\n")


def test_explain_takes_modules_and_refuses_the_rest():
    norm = fusedattn.nn.LayerNorm(8)
    assert fusedattn.explain(norm, torch.randn(2, 8)).startswith("layer_norm: cpu\n")
    with pytest.raises(TypeError, match="got function of type Tensor"):
        fusedattn.explain(torch.randn(2, 8))
    with pytest.raises(ValueError, match="calls no op of fusedattn"):
        fusedattn.explain(torch.relu, torch.randn(2, 8))
    with pytest.raises(ValueError, match="expected 3 dimensions or more"):
        fusedattn.explain(fusedattn.attention, *torch.randn(3, 2, 8))


def test_attention_serves_cpu_tensors_natively(fast_backend):
    given = torch.zeros(3, 1, 2, 4, 8)
    report = fusedattn.explain(fusedattn.attention, *given)
    assert report.startswith(f"attention: {fast_backend}\n")
