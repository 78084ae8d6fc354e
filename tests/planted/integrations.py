"""The mutants of the adapters: file → (old, new, test, …), as in mutants.py."""

MUTANTS = {
    "python/fusedattn/integrations/_sdpa_switch.py": (
        ("            _forget_resolved()\n        # Who", "        # Who",
         "integration_sdpa_reach.py::test_compiles_anew_after_it_was_on"),
        ("return out, lse.transpose(1, 2).contiguous().transpose(1, 2)", "return out, lse",
         "integration_sdpa_reach.py::test_lays_out_results_as_aten_does"),
    ),
    "python/fusedattn/integrations/transformers.py": (
        ("mask = same if mask is None else mask & same", "mask = same if mask is None else mask",
         "integration_transformers.py::test_packed_sequences_with_windows"),
        ("_masked.add(type(self.config))", "pass",
         "integration_transformers.py::test_causal_without_a_mask_where_nobody_tried_it"),
    ),
    "python/fusedattn/integrations/patch.py": (
        ("for s in (1e-3, 1.0, 1e2)", "for s in (1.0,)",
         "integration_patch.py::test_tells_by_results_not_by_names"),
        ("past_seen_tokens + query_length == key_length", "True",
         "integration_patch.py::test_relative_biases_by_rule"),
    ),
}  # fmt: skip
