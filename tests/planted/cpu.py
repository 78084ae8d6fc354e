"""The mutants of the CPU kernels: file → (old, new, test, …), as in mutants.py."""

MUTANTS = {
    "csrc/include/attention.h": (
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
    "csrc/cpu/attention_decode.h": (
        ("scores.mask.shows(at.b", "true || scores.mask.shows(at.b",
         "attention_masks.py::test_of_a_cache_only_what_one_query_may_see_is_read"),
        ("f.page_rows - j % f.page_rows, past - j", "past - j, past - j",
         "attention_decode.py::test_the_cpu_gives_the_bits_of_attention"),
        ("l += split[rows + r] * factor;", "l += split[rows + r];",
         "attention.py::test_decode"),
        ("keep + before);", "keep);",
         "attention.py::test_kind[cpu-dropout_+_decoding-float32]"),
    ),
    "csrc/cpu/attention_jvp.h": (
        ("if (t.slope != nullptr) x *= load(t.slope + j);", "",
         "attention_jvp.py::test_options[cpu-softcap]"),
        ("load(t_o + c) - load(o + c) * t_lse", "load(t_o + c)",
         "attention_jvp.py::test_options[cpu-plain]"),
        ("select_bytes<S>(keep + j + c * v, y[c], zero)", "y[c]",
         "attention_jvp.py::test_options[cpu-dropout]"),
    ),
    "csrc/cpu/attention_backward.h": (
        ("dp * kept,", "dp,", "attention.py::test_kind[cpu-dropout-float32]"),
        ("if (sums) sums.clear(memory.dbias);", "",
         "attention.py::test_bias_broadcast_and_its_gradient"),
    ),
    "csrc/cpu/attention_bias_sums.h": (
        ("over_batch && used ? n * f.heads_kv() + unit", "over_batch && used ? unit",
         "attention.py::test_bias_broadcast_and_its_gradient"),
        ("(over_heads ? 0 : g)", "0", "attention.py::test_bias_broadcast_and_its_gradient"),
    ),
    "csrc/cpu/attention_bias_grad.h": (
        ("load(grad + j) * S(scores.dropout.factor)", "load(grad + j)",
         "attention.py::test_instruction_set[avx2-dropout-float32]"),
    ),
    "csrc/cpu/attention_mask.h": (
        ("i + f.sequence(b).offset + 1", "i + f.sequence(b).offset",
         "attention_rules.py::test_regime[cpu-prefix-fp32]"),
        ("q.least <= k.most && k.least", "q.least < k.most && k.least",
         "attention_rules.py::test_regime[cpu-documents-fp32]"),
        ("both(found, most != 0, least == 0)", "both(found, most != 0, false)",
         "attention.py::test_kind"),
        ("? seen : hidden) = true", "? seen : seen) = true",
         "attention_rules.py::test_regime[cpu-blocks-fp32]"),
    ),
    "csrc/cpu/attention_distance_sums.h": (
        ("sequence.seq_q - 1 - i;", "sequence.seq_q - i;",
         "attention_rules.py::test_regime[cpu-t5, tile edges-fp32]"),
        ("+ double(of(split, b, h, 1)[place])", "",
         "attention_rules.py::test_regime[cpu-t5, tile edges-fp32]"),
    ),
    "csrc/cpu/attention_softmax.h": (
        ("if (above <= 0) return {x.base, x.l + power_of_two(above)};",
         "if (above <= 0) return {x.base, x.l};", "attention.py::test_kind"),
    ),
    "csrc/cpu/attention_tile.h": (
        ("steep * distance(sequence, i, j0 + j)", "steep * distance(sequence, i + 1, j0 + j)",
         "attention.py::test_kind"),
        ("store(slope + j, S(1) - t * t)", "store(slope + j, splat(S(1)))",
         "attention.py::test_kind"),
        ("RowCounter{uint32_t(i), uint32_t(h), uint32_t(b)}",
         "RowCounter{uint32_t(h), uint32_t(i), uint32_t(b)}",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
    ),
    "csrc/cpu/rowwise/softmax_backward.h": (
        # The columns past the diagonal stay unwritten: only NaN there shows it.
        ("    write_zeros(at, n, p.width());", "", "softmax.py::test_causal_is_its_mask"),
    ),
    "csrc/cpu/rowwise/sinusoidal.cpp": (
        ("!shared || i != encoded", "i != encoded", "sinusoidal.py::test_positions"),
    ),
    "csrc/cpu/rowwise/swiglu.cpp": (
        ("(square < most ? square : most)", "square", "swiglu.py::test_numbers_without_limit"),
        ("both * (s.at + x * s.slope)", "both * s.at", "swiglu.py::test_widths"),
    ),
    "csrc/cpu/rowwise/rotary.cpp": (
        ("swap_neighbours(each) * s[k]", "each * s[k]", "rotary.py::test_shapes"),
    ),
}  # fmt: skip
