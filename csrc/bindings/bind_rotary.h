// The rotary embedding's function of a native module: Python's arguments into its parameter struct.
#pragma once

#include "checks.h"
#include "rotary.h"

namespace fusedattn::bindings {

// cos or sin: (T, R/2) or (1 or B, T, R/2) as the latter.
inline TensorView table_view(Reader& read, const char* name, py::handle table) {
  TensorView result = read.broadcast(name, table, Align::last);
  Argument(name, result).shape({1, result.shape[1], result.shape[2], result.shape[3]});
  for (int i = 0; i < 3; ++i) {
    result.shape[i] = result.shape[i + 1];
    result.stride[i] = result.stride[i + 1];
  }
  result.shape[3] = 1;
  result.stride[3] = 0;
  return result;
}

template <>
inline void check(const Rotary& p) {
  const int64_t batch = p.x.shape[0], length = p.x.shape[2], features = p.x.shape[3];
  const Sizes full = {batch, p.x.shape[1], length, features};
  const Sizes second = {batch, p.x2.shape[1], length, features};
  const int64_t half = p.cos.shape[2];
  const Sizes table = {p.cos.shape[0] == 1 ? 1 : batch, p.cos.shape[1], half};
  Argument("x", p.x).given().filled().floating();
  Argument("x2", p.x2).filled().shape(second).dtype(p.dtype());
  Argument("cos", p.cos).given().filled().shape(table).floating();
  Argument("sin", p.sin).given().shape(table).dtype(p.cos.dtype);
  if (2 * half > features)
    throw py::value_error("fusedattn: got cos and sin of " + std::to_string(half) +
                          " columns, expected at most " + std::to_string(features / 2));
  Argument("positions", p.positions).shape({p.positions.shape[0] == 1 ? 1 : batch, length});
  Argument("positions", p.positions).integer();
  Argument("offset", p.offset).shape({1}).integer();
  Argument("out", p.out).given().shape(full).dtype(p.dtype());
  if (p.x2) Argument("out2", p.out2).given();
  Argument("out2", p.out2).shape(second).dtype(p.dtype());
}

// `config` is RotaryConfig of fusedattn/ops/rotary_config.py.
inline void bind_rotary(py::module_& m, void (*forward)(const Rotary&, Stream)) {
  m.def(
      "rotary_forward",
      [forward](py::handle x, py::handle x2, py::handle cos, py::handle sin, py::handle positions,
                py::handle offset, py::handle out, py::handle out2, const py::tuple& config,
                Stream stream) {
        Rotary params;
        Reader read;
        params.x = read.view("x", x);
        params.x2 = read.view("x2", x2);
        params.cos = table_view(read, "cos", cos);
        params.sin = table_view(read, "sin", sin);
        params.positions = read.broadcast("positions", positions);
        params.offset = read.view("offset", offset);
        params.out = read.view("out", out);
        params.out2 = read.view("out2", out2);
        params.options.interleaved = config[0].cast<bool>();
        params.options.inverse = config[1].cast<bool>();
        params.options.offset = config[2].cast<int64_t>();
        run_checked(forward, params, stream);
      },
      py::arg("x"), py::arg("x2"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
      py::arg("offset"), py::arg("out"), py::arg("out2"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out and, where given, out2; out may be x.");
}

}  // namespace fusedattn::bindings
