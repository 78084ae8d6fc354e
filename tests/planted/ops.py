"""The mutants of the oracle, the ops and the modules: file → (old, new, test, …)."""

MUTANTS = {
    "python/fusedattn/reference/dropout.py": (
        ("0x9E3779B9", "0x9E3779B8", "norm_dropout.py::test_philox"),
        ("query[:, None], head, batch[:, None, None, None]",
         "query[:, None], batch[:, None, None, None], head",
         "attention_dropout.py::test_the_mask_is_the_same_everywhere"),
        ("places.query, head, places.batch", "places.query, head, places.batch * 0",
         "attention_dropout.py::test_a_seed_drops_of_packed_sequences_what_it_drops_of_a_batch"),
    ),
    "python/fusedattn/reference/functional.py": (
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
    "python/fusedattn/reference/positions.py": (
        ('found.masked_fill(absent[..., None], float("nan"))', "found",
         "rotary.py::test_position_without_a_row_in_compiled_code"),
        ("base ** (-2.0 * i / width)", "base ** (-2.0 * i / (width + 1))",
         "sinusoidal.py::test_shapes"),
    ),
    "python/fusedattn/ops/_checks.py": (
        ('"bottom_right": 2}', '"bottom_right": 1}',
         "attention.py::test_causal_alignment_in_full"),
        ("if have != want and have != 1:", "if have != want and want == 1:",
         "attention_inputs.py::test_bad_argument"),
        ("return (0, True) in left", "return False", "checks.py"),
    ),
    "python/fusedattn/ops/_op.py": (
        ("views = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]",
         "views = list(inputs)", "second_order.py::test_one_tensor_in_every_place"),
        ("ctx.kept != (found := _layouts(tensors))", "not (found := _layouts(tensors))",
         "library_ops.py::test_a_saved_tensor_comes_back_as_it_was"),
        ("backward.record(call, name, backward.library)", "backward.library(call, name)",
         "second_order.py::test_one_tensor_in_every_place"),
    ),
    "python/fusedattn/ops/attention_backends.py": (
        ("dout, call.dlse, q, k, v, **_options", "dout, None, q, k, v, **_options",
         "second_order.py::test_inputs_that_share_a_history"),
    ),
    "python/fusedattn/reference/rules.py": (
        ("| (step <= 0))[:, None]", "| (step < 0))[:, None]",
         "attention_rules.py::test_regime[cpu-prefix-fp32]"),
        ("places = _places(step, values.shape[-1], zero)",
         "places = _places(-step, values.shape[-1], zero)",
         "attention_rules.py::test_regime[cpu-t5,_tile_edges-fp32]"),
    ),
    "python/fusedattn/biases.py": (
        ("distance < exact, distance, far", "distance <= exact, distance, far",
         "attention_rules.py::test_t5_buckets_are_those_of_transformers"),
        ("torch.arange(1 - seq_k, seq_q,", "torch.arange(1 - seq_q, seq_k,",
         "attention_rules.py::test_distances_count_from_the_last_query_and_key"),
    ),
    "python/fusedattn/reference/varlen.py": (
        (">= cu[1:]", "> cu[1:]", "attention_varlen.py::test_regime"),
    ),
    "python/fusedattn/ops/attention_checks.py": (
        ("values[-1] > rows", "values[-1] > rows + 1",
         "attention_varlen.py::test_export_with_dynamic_shapes"),
    ),
    "python/fusedattn/ops/attention_kernels.py": (
        ("delta = delta - call.dlse", "pass", "attention.py::test_kind"),
        ("out.zero_(), lse.fill_(", "out, lse.fill_(", "attention_inputs.py::test_empty"),
        ("(3 * q[3] + 2 * v[3])", "(2 * q[3] + 3 * v[3])",
         "attention_torch.py::test_flop_counter"),
    ),
    "python/fusedattn/ops/_library.py": (
        ("or x.is_neg()", "", "dispatch.py::test_negative_views"),
        ("call = self._check(call)", "pass", "library_ops.py::test_hostile_calls_of_raw_ops"),
        ("elif x.numel() != 0 and x.data_ptr() == 0:", "elif x.numel() < 0:",
         "library_ops.py::test_a_tensor_whose_storage_was_freed"),
        ("x if x.dtype == torch.float64 else x.to(dtype)", "x.to(dtype)",
         "attention_torch.py::test_raw_op_under_autocast"),
        ("(_transforms() or _batched())", "_transforms()",
         "second_order.py::test_a_batch_of_gradients_stays_in_the_graph"),
    ),
    "python/fusedattn/ops/_registry.py": (
        ("_warned.add(key)", "pass", "registry.py::test_fallback_warns_once_per_reason"),
    ),
    "python/fusedattn/ops/norm.py": (
        ("config.dropout_p == 0.0 and residual.dtype is x.dtype", "residual.dtype is x.dtype",
         "norm.py::test_every_backend", "norm.py::test_which_outputs_have_a_gradient"),
    ),
    "python/fusedattn/ops/softmax.py": (
        ("ds.sum_to_size(shape)", "ds[:1].sum_to_size(shape)",
         "softmax.py::test_bias_broadcast_and_its_gradient"),
    ),
    "python/fusedattn/ops/swiglu.py": (
        ("and x.stride(-1) != 1", "and False", "swiglu.py::test_layouts"),
    ),
    "python/fusedattn/ops/sinusoidal.py": (
        ("return scale * dout, None, None", "return dout, None, None",
         "op_autograd.py::test_derivatives"),
    ),
    "python/fusedattn/nn/attention.py": (
        ("blocked | part", "blocked & part",
         "nn_multihead_attention.py::test_matches_torch"),
        ("self.register_forward_pre_hook(_called_in_evaluation)", "pass",
         "nn_multihead_attention_contract.py::test_encoder_calls_the_fused_op"),
    ),
    "python/fusedattn/nn/rotary_scaling.py": (
        ("(self.dim / (self.dim - 2))", "(self.dim / self.dim)",
         "positional_modules.py::test_frequencies_are_those_of_hugging_face"),
    ),
}  # fmt: skip
