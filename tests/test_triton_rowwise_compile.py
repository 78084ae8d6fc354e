"""The machine code of the norms', softmax's and SwiGLU's Triton kernels, compiled ahead of time.

Run as a script with the name of a target, this file prints what `cuobjdump` finds as JSON, as
`test_triton_compile.py` does for attention.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fusedattn.benchmarks.host import Nothing
from processes import wanted
from test_triton_compile import TARGETS as ALL_TARGETS
from test_triton_compile import compile_in_a_process, disassemble, tell

TARGETS = {name: each for name, each in ALL_TARGETS.items() if name != "sm_86"}  # as sm_89
# name: dtype and widths. The hot ones are "layer" to "swiglu", which must not spill.
CASES = {
    "layer": ("bfloat16", (1024, 4096, 8192)),
    "rms": ("bfloat16", (1024, 8192)),
    "softmax": ("bfloat16", (1024, 8192)),
    "swiglu": ("bfloat16", (1024, 5632)),
    "layer, two blocks": ("bfloat16", (12288,)),
    "rms, two blocks": ("bfloat16", (16384,)),
    "layer residual dropout": ("bfloat16", (4096,)),
    "softmax mask bias causal": ("bfloat16", (4096,)),
    "layer fp32": ("float32", (16384, 20480)),
    "softmax fp32": ("float32", (20480,)),
    "swiglu gelu": ("float32", (5632,)),
    "swiglu gelu_tanh": ("float16", (5632,)),
}
HOT = ("layer", "rms", "softmax", "swiglu")


# --- in the subprocess ---------------------------------------------------------------------------


def launch_norm(case: str, width: int, dtype: torch.dtype) -> None:
    from fusedattn.kernels.norm_bwd import norm_backward
    from fusedattn.kernels.norm_fwd import norm_forward
    from fusedattn.ops.norm_config import NormBackwardCall, NormCall, NormConfig

    x, w, rstd = torch.empty(512, width, dtype=dtype), torch.empty(width), torch.empty(512)
    w = w.to(dtype)
    extra = x if "residual" in case else None
    seed = torch.empty(1, dtype=torch.int64) if "dropout" in case else None
    layer = "layer" in case
    mean, bias = (rstd, w) if layer else (None, None)
    config = NormConfig(layer, 1e-5, 0.0, 0.0 if seed is None else 0.1)
    call = NormCall(x, extra, w, bias, seed, 1, None, True, config)
    norm_forward(call, x, extra, mean, rstd)
    dtypes = dtype, None, dtype, None
    backward = NormBackwardCall(x, extra, x, w, mean, rstd, seed, 1, *dtypes, config)
    norm_backward(backward, x, extra, w, bias)


def launch_softmax(case: str, width: int, dtype: torch.dtype) -> None:
    from fusedattn.kernels.softmax import softmax_backward, softmax_forward
    from fusedattn.ops.softmax_config import SoftmaxBackwardCall, SoftmaxCall, SoftmaxConfig

    x = torch.empty(2, 4, 64, width, dtype=dtype)
    mask = torch.empty(2, 1, 1, width, dtype=torch.bool) if "mask" in case else None
    bias = torch.empty(1, 4, 64, width, dtype=dtype) if "bias" in case else None
    config = SoftmaxConfig(2 if "causal" in case else 0, 1.0)
    softmax_forward(SoftmaxCall(x, mask, bias, -1, config), x)
    ds = None if bias is None else x.float()
    softmax_backward(SoftmaxBackwardCall(x, x, -1, True, bias is not None, config), x, ds)


def launch_swiglu(case: str, width: int, dtype: torch.dtype) -> None:
    """Of both halves in one tensor."""
    from fusedattn.kernels.swiglu import swiglu_backward, swiglu_forward
    from fusedattn.ops.swiglu import ACTIVATIONS, SwigluBackwardCall, SwigluCall, SwigluConfig

    gate, up = torch.empty(1, 2, 512, 2 * width, dtype=dtype).chunk(2, -1)
    out = torch.empty(1, 2, 512, width, dtype=dtype)
    config = SwigluConfig(ACTIVATIONS.index(case.split()[1]) if " " in case else 0)
    swiglu_forward(SwigluCall(gate, up, config), out)
    swiglu_backward(SwigluBackwardCall(out, gate, up, config), gate, up)


def compile_target(name: str) -> list[dict[str, Any]]:
    """A record for each kernel of each case and width."""
    import triton
    from fusedattn.kernels import common, norm_bwd, norm_fwd
    from triton.runtime.driver import driver

    arch, shared = TARGETS[name]
    driver.set_active(Nothing(arch=arch))
    device = common.Device(arch, shared, l2=50 << 20, processors=132)
    norm_fwd.device_of = norm_bwd.device_of = lambda x: device
    run = triton.JITFunction.run
    records, about = [], {}

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert options["enable_fp_fusion"], self.__name__
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found = {"kernel": self.__name__, "warps": options["num_warps"]} | disassemble(kernel)
        records.append(about | found)

    triton.JITFunction.run = only_compile
    for case, (dtype, widths) in CASES.items():
        for width in widths:
            about.update({"case": case, "width": width})
            launch = {"softmax": launch_softmax, "swiglu": launch_swiglu}
            launch.get(case.split()[0], launch_norm)(case, width, getattr(torch, dtype))
    return records


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=wanted(TARGETS))
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    records = compile_in_a_process(__file__, request.param)
    return [{"target": request.param} | record for record in records]


@pytest.mark.slow
def test_machine_code(compiled: list[dict[str, Any]]) -> None:
    """No spills in the hot kernels, whose rows move 16 bytes at a time; shared memory fits."""
    for record in compiled:
        assert record["shared"] <= TARGETS[record["target"]][1], record
        if record["case"] in HOT:
            assert not any(record[name] for name in ("STACK", "LOCAL", "LDL", "STL")), record
        # The registers of a processor hold the program.
        assert record["REG"] * record["warps"] * 32 <= 65_536, record
        if record["case"] in HOT and record["kernel"] != "parts_kernel":
            # Every thread has 32 elements of x, or 16 of each of two tensors, and stores as many.
            assert record["LDG"] >= 4, record
            assert record["STG"] >= (4 if record["kernel"] == "forward_kernel" else 2), record


@pytest.mark.slow
def test_long_rows_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    """24 elements a thread of two sums and three tensors, or 32 of one sum, in 128 registers."""
    records = [x for x in compiled if "two blocks" in x["case"]]
    assert {x["kernel"] for x in records} == {"forward_kernel", "backward_kernel", "parts_kernel"}
    for record in records:
        # The forward keeps to fewer registers, which costs it two words.
        allowed = 8 if record["kernel"] == "forward_kernel" else 0
        if (record["target"], record["width"]) == ("sm_100", 16384):
            allowed = 176
        assert record["STACK"] <= allowed, record


@pytest.mark.slow
def test_every_kernel_is_there(compiled: list[dict[str, Any]]) -> None:
    norms = {x["kernel"] for x in compiled if x["case"].startswith(("layer", "rms"))}
    assert norms == {"forward_kernel", "means_kernel", "backward_kernel", "parts_kernel"}
    assert {x["width"] for x in compiled if x["kernel"] == "means_kernel"} == {20480}


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
