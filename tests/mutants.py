"""Wrong lines, planted in a copy of the library one at a time; the named tests have to catch each.

    python tests/mutants.py [word …]     those whose file or tests contain a word; else all

A survivor is a hole in the tests. What the suite drops or merges may lose none of these, so run it
before and after; a new check comes with its mutant. Mutants of C++ take a build each, of two
instruction sets. It is no part of `make test`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from mutants_cuda import CUDA_MUTANTS
from mutants_integrations import INTEGRATION_MUTANTS
from processes import ROOT, SHIPPED

# Of attention in CUDA C++ the emulator gets one dtype and one head dim, "bf16" and "64".
VARIANTS = (('("f16", "bf16")', '("bf16",)'), ('("64", "96", "128", "192", "256")', '("64",)'))
PYTEST = ["-q", "-x", "--deterministic", "--durations=0", "-p", "no:cacheprovider"]
# A compiler that knows no set after avx2: fewer sources to compile.
OLD_COMPILER = '#!/bin/sh\ncase " $* " in *-mavx512f*) exit 1;; esac\nexec g++ "$@"\n'


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; one of `tests` has to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        return self.file.startswith("csrc/cuda")

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc") and not self.emulated

    def __str__(self) -> str:
        return f"{self.file}: {self.old}  →  {self.new or '(nothing)'}"


def mutants(file: str, *rows: tuple[str, ...]) -> list[Mutant]:
    """Of one file: (old, new, test, …)."""
    return [Mutant(file, old, new, tuple(f"tests/test_{x}" for x in at)) for old, new, *at in rows]


MUTANTS = [
    *mutants(
        "python/fusedattn/reference/dropout.py",
        ("0x9E3779B9", "0x9E3779B8", "norm_dropout.py::test_philox"),
        ("query[:, None], head, batch[:, None, None, None]",
         "query[:, None], batch[:, None, None, None], head",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
        ("places.query, head, places.batch", "places.query, head, places.batch * 0",
         "attention_dropout.py::test_a_seed_drops_of_packed_sequences_what_it_drops_of_a_batch"),
    ),
    *mutants(
        "python/fusedattn/reference/functional.py",
        ('0 if causal == "top_left" else seq_k - seq_q', "0",
         "attention.py::test_causal_alignment_in_full"),
        ("row = row - dlse.to(row.dtype)", "row = row + dlse.to(row.dtype)",
         "attention.py::test_kind[reference-LSE_gradient_alone-float64]"),
        ("exists[:, None, :, None], x,", "exists[:, None, :, None] | True, x,",
         "attention_nonfinite.py::test_nothing_leaks_from_past_the_lengths"),
        ("total = total - g.mean(-1, keepdim=True)", "total = total",
         "norm_inputs.py::test_as_torch", "norm.py::test_weight_and_bias_are_optional"),
        ("dp = attention_dropout(torch.matmul(dout, v.transpose(-1, -2)), dropout_p, seed, places)",
         "dp = torch.matmul(dout, v.transpose(-1, -2))",
         "attention.py::test_kind[reference-dropout-float64]"),
        ("return ds * scale, ds", "return ds, ds", "softmax.py::test_scale"),
    ),
    *mutants(
        "python/fusedattn/reference/positions.py",
        ('found.masked_fill(absent[..., None], float("nan"))', "found",
         "rotary.py::test_position_without_a_row_in_compiled_code"),
        ("base ** (-2.0 * i / width)", "base ** (-2.0 * i / (width + 1))",
         "sinusoidal.py::test_shapes"),
    ),
    *mutants(
        "python/fusedattn/ops/_checks.py",
        ('"bottom_right": 2}', '"bottom_right": 1}',
         "attention.py::test_causal_alignment_in_full"),
        ("if have != want and have != 1:", "if have != want and want == 1:",
         "attention_inputs.py::test_bad_argument"),
        ("return (0, True) in left", "return False", "checks.py"),
    ),
    *mutants(
        "python/fusedattn/ops/_op.py",
        ("views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]",
         "views = list(inputs)", "second_order.py::test_one_tensor_in_every_place"),
        ("ctx.kept != (found := _layouts(tensors))", "not (found := _layouts(tensors))",
         "library_ops.py::test_a_saved_tensor_comes_back_as_it_was"),
        ("backward.record(call, name, backward.library)", "backward.library(call, name)",
         "second_order.py::test_one_tensor_in_every_place"),
    ),
    *mutants(
        "python/fusedattn/ops/attention_backends.py",
        ("dout, call.dlse, q, k, v, **options", "dout, None, q, k, v, **options",
         "second_order.py::test_inputs_that_share_a_history"),
    ),
    *mutants(
        "python/fusedattn/reference/varlen.py",
        (">= cu[1:]", "> cu[1:]", "attention_varlen.py::test_regime"),
    ),
    *mutants(
        "python/fusedattn/ops/attention_checks.py",
        ("values[-1] > rows", "values[-1] > rows + 1",
         "attention_varlen.py::test_export_with_dynamic_shapes"),
    ),
    *mutants(
        "python/fusedattn/ops/attention_kernels.py",
        ("delta = delta - call.dlse", "pass", "attention.py::test_kind"),
        ("out.zero_(), lse.fill_(", "out, lse.fill_(", "attention_inputs.py::test_empty"),
        ("(3 * q[3] + 2 * v[3])", "(2 * q[3] + 3 * v[3])",
         "attention_torch.py::test_flop_counter"),
    ),
    *mutants(
        "python/fusedattn/ops/_library.py",
        ("or x.is_neg()", "", "dispatch.py::test_negative_views"),
        ("call = self._check(call)", "pass", "library_ops.py::test_hostile_calls_of_raw_ops"),
        ("elif x.numel() != 0 and x.data_ptr() == 0:", "elif x.numel() < 0:",
         "library_ops.py::test_a_tensor_whose_storage_was_freed"),
        ("x if x.dtype == torch.float64 else x.to(dtype)", "x.to(dtype)",
         "attention_torch.py::test_raw_op_under_autocast"),
    ),
    *mutants(
        "python/fusedattn/ops/_registry.py",
        ("_warned.add(key)", "pass", "registry.py::test_fallback_warns_once_per_reason"),
    ),
    *mutants(
        "python/fusedattn/ops/norm.py",
        ("config.dropout_p == 0.0 and residual.dtype is x.dtype", "residual.dtype is x.dtype",
         "norm.py::test_every_backend", "norm.py::test_which_outputs_have_a_gradient"),
    ),
    *mutants(
        "python/fusedattn/ops/softmax.py",
        ("ds.sum_to_size(shape)", "ds[:1].sum_to_size(shape)",
         "softmax.py::test_bias_broadcast_and_its_gradient"),
    ),
    *mutants(
        "python/fusedattn/ops/swiglu.py",
        ("and x.stride(-1) != 1", "and False", "swiglu.py::test_layouts"),
    ),
    *mutants(
        "python/fusedattn/ops/sinusoidal.py",
        ("return scale * dout, None, None", "return dout, None, None",
         "op_autograd.py::test_derivatives"),
    ),
    *mutants(
        "python/fusedattn/nn/attention.py",
        ("blocked | part", "blocked & part",
         "nn_multihead_attention.py::test_matches_torch"),
        ("self.register_forward_pre_hook(_called_in_evaluation)", "pass",
         "nn_multihead_attention_contract.py::test_encoder_calls_the_fused_op"),
    ),
    *mutants(
        "python/fusedattn/nn/rotary_scaling.py",
        ("(self.dim / (self.dim - 2))", "(self.dim / self.dim)",
         "positional_modules.py::test_frequencies_are_those_of_hugging_face"),
    ),
    *mutants(
        "kernels/attention_scores.py",
        ("limit = tl.minimum(limit, i + sequence.upper + 1)",
         "limit = tl.minimum(limit, i + sequence.upper)",
         "triton_attention.py::test_regimes"),
        ("(j >= i + sequence.lower)", "(j > i + sequence.lower)",
         "triton_attention.py::test_regimes"),
        ("s = s - slope * distance", "s = s + slope * distance",
         "triton_attention.py::test_regimes"),
        ("whole = tl.cdiv(tl.maximum(low + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N", "whole = begin",
         "triton_attention.py::test_regimes"),
        ("full = tl.maximum(tl.minimum(full, past + 1), 0)",
         "full = tl.maximum(tl.minimum(full, past + BLOCK_N), 0)",
         "triton_attention.py::test_regimes"),
        ("whole = tl.cdiv(tl.maximum(low + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M",
         "whole = tl.maximum(low + BLOCK_N - 1, 0) // BLOCK_M * BLOCK_M",
         "triton_attention.py::test_regimes"),
        ("ds = ds * (1.0 - t * t)", "ds = ds * 1.0", "triton_attention.py::test_regimes"),
        ("index - (first_q // BLOCK + number)", "index - (first_q // BLOCK + number + 1)",
         "attention_varlen.py::test_triton"),
        ("tl.minimum(number + 1, sequences)", "tl.minimum(number, sequences)",
         "attention_varlen.py::test_triton"),
        ("i, head, sequence.number, BLOCK_N", "i, sequence.number, head, BLOCK_N",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
    ),
    *mutants(
        "kernels/dropout.py",
        ("tl.interleave(tl.interleave(a > most, c > most), tl.interleave(b > most, d > most))",
         "tl.interleave(tl.interleave(a > most, b > most), tl.interleave(c > most, d > most))",
         "triton_rowwise.py::test_dropout_is_that_of_the_reference"),
        ("math.floor(p * 2**32) - 1", "math.floor(p * 2**31) - 1",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
    ),
    *mutants(
        "kernels/attention_fwd.py",
        ("alpha[:, None]\n                if dropout", "1.0\n                if dropout",
         "triton_attention.py::test_regimes"),
        ("l * alpha + more)", "l * alpha)", "triton_attention.py::test_regimes"),
        ("inverse *= dropout.keep_scale", "inverse *= 1.0",
         "triton_attention.py::test_regimes[dropout, causal]"),
    ),
    *mutants(
        "kernels/attention_launch.py",
        ("or not config.scale > 1e-30", "", "triton_attention.py::test_regimes"),
    ),
    *mutants(
        "kernels/plans.py",
        ("key.append(tuple(addresses.index(x) for x in addresses))", "pass",
         "triton_plans.py::test_in_place_is_a_kind_of_its_own"),
        ("bits |= address", "bits |= 0",
         "triton_plans.py::test_what_makes_a_kind"),
        ("[begin + i * step * dtype.itemsize", "[begin + i * size * dtype.itemsize",
         "triton_plans.py::test_memory_in_one_piece"),
    ),
    *mutants(
        "kernels/attention_delta.py",
        ("tl.where(nothing, 0.0, row)", "row",
         "triton_attention.py::test_regimes", "attention_nonfinite.py::"
         "test_gradient_of_the_log_sum_exp_of_a_row_that_sees_nothing"),
    ),
    *mutants(
        "kernels/attention_dq.py",
        ("unscaled(ds, ds_scale), mask=exists", "ds, mask=inside",
         "attention_fp16_range.py::test_large"),
        ("dp * dropout.keep_scale", "dp * 1.0",
         "triton_attention.py::test_regimes[dropout, causal]"),
    ),
    *mutants(
        "kernels/attention_bwd.py",
        ("dv_tile *= dropout.keep_scale", "dv_tile *= 1.0",
         "triton_attention.py::test_regimes[dropout, causal]"),
        ("kept_p = tl.where(keep, p, 0.0)", "kept_p = p",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
        ("keep = tl.trans(keep)\n                    kept_p = tl.where(keep, p, 0.0)",
         "keep = tl.trans(keep)\n                    kept_p = p = tl.where(keep, p, 0.0)",
         "triton_attention.py::test_regimes[dropout, causal]"),
        ("shift, delta)", "shift, scaled)", "attention_fp16_range.py::test_large"),
    ),
    *mutants(
        "kernels/attention_ds_scale.py",
        ("tl.where(exponent > 141, 268 - exponent, 127)", "tl.where(exponent > 141, 127, 127)",
         "attention_fp16_range.py::test_large"),
        ("load_length(kv_lengths, batch, seq_k)", "seq_k",
         "attention_fp16_range.py::test_what_does_not_count"),
        (' != float("-inf")', ' != float("inf")',
         "attention_fp16_range.py::test_what_does_not_count"),
        ("at = norms + 3 * kv_head", "at = norms + 3",
         "attention_fp16_range.py::test_what_does_not_count"),
        ("268 - exponent", "tl.maximum(268 - exponent, 103)",
         "attention_fp16_range.py::test_every_finite_input"),
        ("bound *= dropout.keep_scale", "bound *= 1.0", "attention_fp16_range.py::test_large"),
    ),
    *mutants(
        "kernels/attention_bias_grad.py",
        ("batch = batch0 + rest // summed_heads", "batch = batch0",
         "triton_attention.py::test_bias_gradient"),
        ("dp * dropout.keep_scale", "dp * 1.0",
         "triton_attention.py::test_regimes[dropout, shared bias, slopes]"),
        ("n0 * BLOCK_N < (m0 + 1) * BLOCK_M + upper", "n0 * BLOCK_N < m0 * BLOCK_M + upper",
         "triton_attention.py::test_bias_gradient"),
    ),
    *mutants(
        "python/fusedattn/ops/_library.py",
        ("(_transforms() or _batched())", "_transforms()",
         "second_order.py::test_a_batch_of_gradients_stays_in_the_graph"),
    ),
    *mutants(
        "kernels/tuning.py",
        ("_asked == 0 and torch", "torch",
         "triton_tuning.py::test_warming_times_what_would_not_be"),
    ),
    *mutants(
        "kernels/common.py",
        ("inside = inside & (col < WIDTH)", "inside = inside & (col <= WIDTH)",
         "triton_attention.py::test_regimes"),
        ("shape = [tl.maximum(rows, 1), WIDTH]", "shape = [tl.maximum(rows, 64), WIDTH]",
         "triton_descriptors.py::test_nothing_past_the_lengths_is_read"),
        ("x.stride(-1) == 1", "x.numel() > 0",
         "triton_descriptors.py::test_descriptors_where_the_layout_allows"),
    ),
    *mutants(
        "kernels/softmax.py",
        ("p = exp_from(s, highest) * inverse[:, None]", "p = exp_from(s, m) * inverse[:, None]",
         "triton_rowwise.py::test_softmax"),
        # Nobody writes the columns that no row of the program sees: only NaN there shows it.
        ("value = p * (d - total[:, None])\n            store_gradient(",
         "value = p * (d - total[:, None])\n            if start < end: store_gradient(",
         "triton_rowwise.py::test_softmax"),
    ),
    *mutants(
        "kernels/norm_fwd.py",
        ("variance = tl.sum(left * left, 1) / width - shift * shift\n    return mean + shift",
         "variance = tl.sum(left * left, 1) / width\n    return mean",
         "triton_rowwise.py::test_constant_rows"),
    ),
    *mutants(
        "kernels/norm_bwd.py",
        ("level += tl.sum(rest_g, 1)", "level += 0.0", "triton_rowwise.py::test_norms"),
    ),
    *mutants(
        "kernels/rotary.py",
        ("sin = -sin", "sin = sin", "rotary_kernels.py::test_regimes"),
    ),
    *mutants(
        "kernels/swiglu.py",
        ("tl.minimum(square, 1e4)", "square", "swiglu.py::test_numbers_without_limit"),
    ),
    *mutants(
        "kernels/sinusoidal.py",
        ("((quarter + 1) & 2)", "(quarter & 2)", "sinusoidal_kernels.py::test_regimes"),
    ),
    *mutants(
        "csrc/include/attention.h",
        ("end_k = packed_k(b + 1)", "end_k = packed_k(b + 1) - 1",
         "attention_varlen.py::test_regime"),
        ("end_q = packed_q(b + 1)", "end_q = packed_q(b + 1) - 1",
         "attention_varlen.py::test_regime"),
        ("Int(all - queries)}", "Int(all - queries + 1)}", "attention.py::test_kind"),
        ("within(i + upper, seq_k)", "within(i + upper - 1, seq_k)",
         "attention.py::test_causal_alignment_in_full"),
        ("within(i + lower, seq_k)", "within(i + lower + 1, seq_k)",
         "attention.py::test_kind"),
        ("within(j - lower + 1, seq_q)", "within(j - lower - 40, seq_q)",
         "attention.py::test_kind"),
    ),
    *mutants(
        "csrc/cpu/attention_decode.h",
        ("l += partial[rows + r] * factor;", "l += partial[rows + r];",
         "attention.py::test_decode"),
        ("keep + before);", "keep);",
         "attention.py::test_kind[cpu-dropout_+_decoding-float32]"),
    ),
    *mutants(
        "python/fusedattn/ops/_transforms.py",
        ("with forward_ad._set_fwd_grad_enabled(True):",
         "with forward_ad._set_fwd_grad_enabled(False):",
         "attention_jvp_transforms.py::test_transforms"),
        ("return None if found is None else tuple(map(forward_ad.make_dual, *found))",
         "return found[0]", "attention_jvp_transforms.py::test_transforms"),
    ),
    *mutants(
        "kernels/attention_jvp.py",
        ("t_acc - acc * d[:, None]", "t_acc",
         "attention_jvp.py::test_options_together[triton-plain]"),
        ("t_s = tl.where(keep, t_s, 0.0)", "pass",
         "attention_jvp.py::test_options_together[triton-causal,_bias,_sinks,_dropout]"),
    ),
    *mutants(
        "csrc/cpu/attention_jvp.h",
        ("if (t.slope != nullptr) x *= load(t.slope + j);", "",
         "attention_jvp.py::test_options[cpu-softcap]"),
        ("load(t_o + c) - load(o + c) * t_lse", "load(t_o + c)",
         "attention_jvp.py::test_options[cpu-plain]"),
        ("select_bytes<S>(keep + j + c * v, y[c], zero)", "y[c]",
         "attention_jvp.py::test_options[cpu-dropout]"),
    ),
    *mutants(
        "csrc/cpu/attention_backward.h",
        ("dp * kept,", "dp,", "attention.py::test_kind[cpu-dropout-float32]"),
        ("if (sums) sums.clear(memory.dbias);", "",
         "attention.py::test_bias_broadcast_and_its_gradient"),
    ),
    *mutants(
        "csrc/cpu/attention_bias_sums.h",
        ("over_batch && used ? n * f.heads_kv() + unit", "over_batch && used ? unit",
         "attention.py::test_bias_broadcast_and_its_gradient"),
        ("(over_heads ? 0 : g)", "0", "attention.py::test_bias_broadcast_and_its_gradient"),
    ),
    *mutants(
        "csrc/cpu/attention_bias_grad.h",
        ("load(grad + j) * S(scores.dropout.factor)", "load(grad + j)",
         "attention.py::test_instruction_set[avx2-dropout-float32]"),
    ),
    *mutants(
        "csrc/cpu/attention_softmax.h",
        ("if (above <= 0) return {x.base, x.l + power_of_two(above)};",
         "if (above <= 0) return {x.base, x.l};", "attention.py::test_kind"),
    ),
    *mutants(
        "csrc/cpu/attention_tile.h",
        ("steep * distance(sequence, i, j0 + j)", "steep * distance(sequence, i + 1, j0 + j)",
         "attention.py::test_kind"),
        ("store(slope + j, S(1) - t * t)", "store(slope + j, splat(S(1)))",
         "attention.py::test_kind"),
        ("RowCounter{uint32_t(i), uint32_t(h), uint32_t(b)}",
         "RowCounter{uint32_t(h), uint32_t(i), uint32_t(b)}",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
    ),
    *mutants(
        "csrc/cpu/rowwise/softmax_backward.h",
        # The columns past the diagonal stay unwritten: only NaN there shows it.
        ("    write_zeros(at, n, p.width());", "", "softmax.py::test_causal_is_its_mask"),
    ),
    *mutants(
        "csrc/cpu/rowwise/sinusoidal.cpp",
        ("!shared || i != encoded", "i != encoded", "sinusoidal.py::test_positions"),
    ),
    *mutants(
        "csrc/cpu/rowwise/swiglu.cpp",
        ("(square < most ? square : most)", "square", "swiglu.py::test_numbers_without_limit"),
        ("both * (s.at + x * s.slope)", "both * s.at", "swiglu.py::test_widths"),
    ),
    *mutants(
        "csrc/cpu/rowwise/rotary.cpp",
        ("swap_neighbours(each) * s[k]", "each * s[k]", "rotary.py::test_shapes"),
    ),
    *(x for f, rows in (CUDA_MUTANTS | INTEGRATION_MUTANTS).items() for x in mutants(f, *rows)),
]  # fmt: skip


# --- running them --------------------------------------------------------------------------------


def package(tree: Path, site: Path) -> Path:
    """`site` as a folder from which Python imports the library of `tree`."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name, folder in SHIPPED.items():
        shutil.copytree(tree / folder, site / name, ignore=ignored, dirs_exist_ok=True)
    return site


def run(tests: tuple[str, ...], site: Path) -> str:
    """What comes of the tests: "passed", the first that failed, or why they could not run.

    For a process of its own, forked from this one, which has imported what takes long.
    """
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(site)
    sys.path.insert(0, str(site))
    sys.setdlopenflags(os.RTLD_LAZY)  # the emulator's module lacks the kernels of other head dims
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = pytest.main([*PYTEST, *tests])
    failed = re.search(r"^FAILED (.*?)(?: - .*)?$", text.getvalue(), re.MULTILINE)
    if status == 1 and failed:
        return failed[1]
    return "passed" if status == 0 else f"BROKEN: {text.getvalue()[-2000:]}"


def build(tree: Path, emulator: bool) -> None:
    """The native CPU module of a tree, in place, or that of the emulator."""
    environment = {**os.environ, "CXX": str(tree / "g++"), "FUSEDATTN_CUDA_ARCHS": "none"}
    what = ["build_emulator"] if emulator else ["build_ext", "--inplace"]
    command = [sys.executable, "setup.py", "-q", *what]
    subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)


def make_tree(folder: Path, native: bool, emulated: bool) -> Path:
    """The sources; what is to be built with the old compiler, so that little is left to build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("csrc", *SHIPPED.values()):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))
    (folder / "g++").write_text(OLD_COMPILER)
    (folder / "g++").chmod(0o755)
    path = folder / "csrc/native_build.py"
    text = path.read_text()
    for old, new in VARIANTS:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    for emulator, wanted in ((False, native), (True, emulated)):
        if wanted:
            build(folder, emulator)
    return folder


def try_out(mutant: Mutant | None, tree: Path, tests: tuple[str, ...]) -> str:
    """The mutant, or None, in a copy of the sources in `tree`."""
    with tempfile.TemporaryDirectory() as name:
        changed = shutil.copytree(tree, Path(name, "tree"))
        if mutant:
            path = changed / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                return f"STALE: the old text stands there {text.count(mutant.old)} times"
            path.write_text(text.replace(mutant.old, mutant.new))
            if mutant.native or mutant.emulated:
                build(changed, mutant.emulated)
        return run(tests, package(changed, Path(name, "site")))


def main(words: list[str]) -> int:
    """Returns 1 if one is not caught, or its tests fail without it."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("hypothesis", "torch._dynamo", "triton"):
        importlib.import_module(name)
    assert "fusedattn" not in sys.modules, "each process has one of its own"
    about = {x: f"{x.file} {' '.join(x.tests)}" for x in MUTANTS}
    chosen = [x for x in MUTANTS if not words or any(word in about[x] for word in words)]
    begun = time.time()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name, context.Pool(2, maxtasksperchild=1) as pool:
        tree = make_tree(Path(name), any(x.native for x in chosen), any(x.emulated for x in chosen))
        tests = tuple(dict.fromkeys(test for x in chosen for test in x.tests))
        sound = pool.apply_async(try_out, (None, tree, tests))
        found = [pool.apply_async(try_out, (x, tree, x.tests)) for x in chosen]
        caught = 0
        for mutant, outcome in zip(chosen, found, strict=True):
            text = outcome.get()
            caught += text.startswith("tests/")
            print(f"{mutant}\n    {text.replace('passed', 'SURVIVED')}", flush=True)
        print(f"without any: {sound.get()}")
    print(f"{caught} of {len(chosen)} caught, {time.time() - begun:.0f} s")
    return int(caught < len(chosen) or sound.get() != "passed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
