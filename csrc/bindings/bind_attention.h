// Attention's functions of a native module: Python's arguments into its parameter structs.
#pragma once

#include "attention.h"
#include "tensor.h"

namespace fusedattn::bindings {

// `config` is AttentionConfig of fusedattn/ops/attention_config.py.
inline void read(AttentionForward& params, py::handle q, py::handle k, py::handle v,
                 py::handle mask, py::handle bias, py::handle kv_lengths, py::handle out,
                 py::handle lse, const py::tuple& config) {
  params.q = view(q);
  params.k = view(k);
  params.v = view(v);
  params.mask = broadcast_view(mask);
  params.bias = broadcast_view(bias);
  params.kv_lengths = view(kv_lengths);
  params.out = view(out);
  params.lse = view(lse);
  params.options.causal = Causal(config[0].cast<int>());
  params.options.scale = config[1].cast<double>();
  params.options.deterministic = config[6].cast<bool>();
}

inline void bind_attention(py::module_& m, void (*forward)(const AttentionForward&, Stream),
                           void (*backward)(const AttentionBackward&, Stream)) {
  m.def(
      "attention_forward",
      [forward](py::handle q, py::handle k, py::handle v, py::handle mask, py::handle bias,
                py::handle kv_lengths, py::handle out, py::handle lse, const py::tuple& config,
                Stream stream) {
        AttentionForward params;
        read(params, q, k, v, mask, bias, kv_lengths, out, lse, config);
        const WithoutGil release;
        forward(params, stream);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("bias"),
      py::arg("kv_lengths"), py::arg("out"), py::arg("lse"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out and lse.");
  m.def(
      "attention_backward",
      [backward](py::handle dout, py::handle dlse, py::handle q, py::handle k, py::handle v,
                 py::handle out, py::handle lse, py::handle dq, py::handle dk, py::handle dv,
                 py::handle dbias, py::handle mask, py::handle bias, py::handle kv_lengths,
                 const py::tuple& config, Stream stream) {
        AttentionBackward params;
        read(params, q, k, v, mask, bias, kv_lengths, out, lse, config);
        params.dout = view(dout);
        params.dlse = view(dlse);
        params.dq = view(dq);
        params.dk = view(dk);
        params.dv = view(dv);
        params.dbias = broadcast_view(dbias);
        const WithoutGil release;
        backward(params, stream);
      },
      py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
      py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"),
      py::arg("mask"), py::arg("bias"), py::arg("kv_lengths"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes dq, dk, dv and, where given, dbias.");
}

}  // namespace fusedattn::bindings
