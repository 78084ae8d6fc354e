// Attention's functions of a native module: Python's arguments into its parameter structs.
#pragma once

#include "attention.h"
#include "checks.h"

namespace fusedattn::bindings {

// `config` is AttentionConfig of fusedattn/ops/attention_config.py.
inline void read(Reader& reader, AttentionForward& params, py::handle q, py::handle k, py::handle v,
                 py::handle mask, py::handle bias, py::handle kv_lengths, py::handle out,
                 py::handle lse, const py::tuple& config) {
  params.q = reader.view("q", q);
  params.k = reader.view("k", k);
  params.v = reader.view("v", v);
  params.mask = reader.broadcast("mask", mask);
  params.bias = reader.broadcast("bias", bias);
  params.kv_lengths = reader.view("kv_lengths", kv_lengths);
  params.out = reader.view("out", out);
  params.lse = reader.view("lse", lse);
  params.options.causal = causal_of<Causal>(config[0]);
  params.options.scale = config[1].cast<double>();
  params.options.deterministic = config[6].cast<bool>();
}

template <>
inline void check(const AttentionForward& p) {
  const DType dtype = p.dtype();
  const int64_t batch = p.batch(), heads = p.heads(), heads_kv = p.heads_kv();
  const Sizes scores = {batch, heads, p.seq_q(), p.seq_k()};
  const Sizes keys = {batch, heads_kv, p.seq_k(), p.head_dim()};
  const Sizes values = {batch, heads_kv, p.seq_k(), p.head_dim_v()};
  Argument("q", p.q).given().filled().floating();
  Argument("k", p.k).given().filled().shape(keys).dtype(dtype);
  Argument("v", p.v).given().filled().shape(values).dtype(dtype);
  if (heads % heads_kv != 0)
    throw py::value_error("fusedattn: got " + std::to_string(heads) + " query heads and " +
                          std::to_string(heads_kv) + " key heads, expected a multiple");
  Argument("mask", p.mask).broadcasts(scores).dtype(DType::boolean);
  Argument("bias", p.bias).broadcasts(scores).floating_beside(dtype, true);
  Argument("kv_lengths", p.kv_lengths).shape({batch}).integer();
  Argument("out", p.out).given().shape({batch, heads, p.seq_q(), p.head_dim_v()}).dtype(dtype);
  Argument("lse", p.lse).given().shape({batch, heads, p.seq_q()}).dtype(wide(dtype));
}

template <>
inline void check(const AttentionBackward& p) {
  check<AttentionForward>(p);
  const auto like = [](const char* name, const TensorView& view, const TensorView& other) {
    const int64_t* n = other.shape;
    return Argument(name, view).shape({n[0], n[1], n[2], n[3]}).dtype(other.dtype);
  };
  like("dout", p.dout, p.out);
  like("dlse", p.dlse, p.lse);
  like("dq", p.dq, p.q).given();
  like("dk", p.dk, p.k).given();
  like("dv", p.dv, p.v).given();
  if (p.dbias) Argument("bias", p.bias).given();
  like("dbias", p.dbias, p.bias);
}

inline void bind_attention(py::module_& m, void (*forward)(const AttentionForward&, Stream),
                           void (*backward)(const AttentionBackward&, Stream)) {
  m.def(
      "attention_forward",
      [forward](py::handle q, py::handle k, py::handle v, py::handle mask, py::handle bias,
                py::handle kv_lengths, py::handle out, py::handle lse, const py::tuple& config,
                Stream stream) {
        AttentionForward params;
        Reader reader;
        read(reader, params, q, k, v, mask, bias, kv_lengths, out, lse, config);
        run_checked(forward, params, stream);
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
        Reader reader;
        read(reader, params, q, k, v, mask, bias, kv_lengths, out, lse, config);
        params.dout = reader.view("dout", dout);
        params.dlse = reader.view("dlse", dlse);
        params.dq = reader.view("dq", dq);
        params.dk = reader.view("dk", dk);
        params.dv = reader.view("dv", dv);
        params.dbias = reader.broadcast("dbias", dbias);
        run_checked(backward, params, stream);
      },
      py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
      py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"),
      py::arg("mask"), py::arg("bias"), py::arg("kv_lengths"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes dq, dk, dv and, where given, dbias.");
}

}  // namespace fusedattn::bindings
