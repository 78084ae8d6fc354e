"""The mutants of attention in CUDA C++: file → (old, new, test, …), as in mutants.py.

The emulator runs them, with kernels for bf16 and head dims up to 64 alone.
"""

MUTANTS = {
    "csrc/cuda/sm80/attention_scores.cuh": (
        ("j < sequence_.begin(i) || j >=", "j >=",
         "cuda_attention_options.py::test_option[cuda_emulated-window]"),
        ("fma(-steepness_,", "fma(steepness_,",
         "cuda_attention_options.py::test_option[cuda_emulated-slopes]"),
        ("slope[e] = fma(-t, t, 1.0f);", "slope[e] = 1.0f;",
         "cuda_attention_options.py::test_option[cuda_emulated-window_of_one_key]",
         "cuda_attention_options.py::test_option[cuda_emulated-bias_f32]"),
        ("fma(total, factor, exp2((sink - highest) * log2_e))", "total * factor",
         "cuda_attention_options.py::test_option[cuda_emulated-sinks]"),
        ("uint32_t(h_), uint32_t(b_)", "uint32_t(b_), uint32_t(h_)",
         "cuda_attention_options.py::test_dropout_is_that_of_the_reference"),
        ("      exchange(words, rank, 2);\n", "",
         "cuda_attention_options.py::test_dropout_is_that_of_the_reference"),
    ),
    "csrc/cuda/sm80/attention_backward_scores.cuh": (
        ("dx[e] * rules.keep_scale", "dx[e]",
         "cuda_attention_options.py::test_option[cuda_emulated-dropout_causal]"),
    ),
    "csrc/cuda/sm80/attention_forward.cuh": (
        ("windowed && 8 * j + e < begin", "windowed && 8 * j + e <= begin",
         "cuda_attention_options.py::test_option[cuda_emulated-window]"),
        ("p.rules.keep_scale, sunk", "1.0f, sunk",
         "cuda_attention_options.py::test_option[cuda_emulated-dropout_causal]"),
    ),
    "csrc/cuda/sm80/attention_backward.cuh": (
        ("-slope_sum * inverse", "slope_sum * inverse",
         "cuda_attention_options.py::test_option[cuda_emulated-slopes]"),
    ),
    "csrc/cuda/sm80/attention_backward_bias.cuh": (
        ("size[0] == 1 ? int(p.batch())", "size[0] == 1 ? 1",
         "cuda_attention_options.py::test_option[cuda_emulated-bias_of_all_batches]"),
        ("one_column() || tiles.end <= tile_k", "tiles.end <= tile_k",
         "cuda_attention_options.py::test_option[cuda_emulated-bias_of_queries]"),
    ),
    "csrc/cuda/sm80/attention_common.cuh": (
        ("end_k = packed_row(cu_k, b + 1, rows_k);", "end_k = packed_row(cu_k, b + 1, rows_k) - 1;",
         "cuda_attention_options.py::test_packed"),
        ("first / width + middle <= tile", "first / width + middle < tile",
         "cuda_attention_options.py::test_packed"),
    ),
    "csrc/cuda/attention_combine.cu": (
        ("if (present(p.sinks) && total != 0.0f)", "if (false)",
         "cuda_attention_options.py::test_keys_split_between_blocks"),
    ),
    "csrc/cuda/attention_slopes.cu": (
        ("end = first(of + 1);", "end = first(of + 1) - 1;",
         "cuda_attention_options.py::test_packed"),
    ),
}  # fmt: skip
