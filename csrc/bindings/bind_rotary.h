// The rotary embedding's function of a native module: Python's arguments into its parameter struct.
#pragma once

#include "rotary.h"
#include "tensor.h"

namespace fusedattn::bindings {

// cos or sin: (T, R/2) or (1 or B, T, R/2) as the latter.
inline TensorView table_view(py::handle table) {
  TensorView result = broadcast_view(table, Align::last);
  for (int i = 0; i < 3; ++i) {
    result.shape[i] = result.shape[i + 1];
    result.stride[i] = result.stride[i + 1];
  }
  result.shape[3] = 1;
  result.stride[3] = 0;
  return result;
}

// `config` is RotaryConfig of fusedattn/ops/rotary_config.py.
inline void bind_rotary(py::module_& m, void (*forward)(const Rotary&, Stream)) {
  m.def(
      "rotary_forward",
      [forward](py::handle x, py::handle x2, py::handle cos, py::handle sin, py::handle positions,
                py::handle offset, py::handle out, py::handle out2, const py::tuple& config,
                Stream stream) {
        Rotary params;
        params.x = view(x);
        params.x2 = view(x2);
        params.cos = table_view(cos);
        params.sin = table_view(sin);
        params.positions = broadcast_view(positions);
        params.offset = view(offset);
        params.out = view(out);
        params.out2 = view(out2);
        params.options.interleaved = config[0].cast<bool>();
        params.options.inverse = config[1].cast<bool>();
        params.options.offset = config[2].cast<int64_t>();
        const WithoutGil release;
        forward(params, stream);
      },
      py::arg("x"), py::arg("x2"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
      py::arg("offset"), py::arg("out"), py::arg("out2"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out and, where given, out2; out may be x.");
}

}  // namespace fusedattn::bindings
