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
        ("    clear<m>(key_sums);\n  }", "  }",
         "cuda_attention_bias.py::test_in_one_pass[cuda_emulated-row_window_lengths_slopes]"),
        ("      clear_rows(first, begin <", "      if (false) clear_rows(first, begin <",
         "cuda_attention_bias.py::test_in_one_pass[cuda_emulated-pairs_window_lengths]"),
        ("      clear_rows(first + end, p.longest_q());\n", "",
         "cuda_attention_bias.py::test_in_one_pass[cuda_emulated-pairs_window_lengths]"),
    ),
    "csrc/cuda/sm80/attention_backward_bias.cuh": (
        ("size[0] == 1 ? int(p.batch())", "size[0] == 1 ? 1",
         "cuda_attention_bias.py::test_every_shape[cuda_emulated-heads-columns-rows-in order]"),
        ("one_column() || tiles.end <= tile_k", "tiles.end <= tile_k",
         "cuda_attention_bias.py::test_every_shape[cuda_emulated-both-column-rows-in order]"),
    ),
    "csrc/cuda/sm80/attention_backward_bias_sums.cuh": (
        ("ds[e] += ds[e + 2];", "",
         "cuda_attention_bias.py::test_every_shape[cuda_emulated-both-column-rows-one pass]"),
        ("lane() % (column ? warp_size : 4) == 0", "lane() % 4 == 0",
         "cuda_attention_bias.py::test_every_shape[cuda_emulated-both-column-row-one pass]"),
    ),
    "csrc/cuda/sm80/attention_backward.cu": (
        ("shared = shared || n != scores[i]", "shared = shared || (i > 0 && n != scores[i])",
         "cuda_attention_bias.py::test_every_shape[cuda_emulated-heads-columns-rows-one pass]"),
        ("dense && p.dbias.dtype == DType::f32", "p.dbias.dtype == DType::f32",
         "cuda_attention_bias.py::test_any_strides"),
        ("if (p.options.deterministic) return BiasWay::in_order;", "",
         "cuda_attention_bias.py::test_same_bits_whatever_the_threads_do"),
    ),
    "csrc/cuda/attention_bias.cu": (
        ("store(dbias.at<bf16>(b, h, i, j)", "store(dbias.at<bf16>(b, h, 0, j)",
         "cuda_attention_bias.py::test_any_strides"),
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
