// Sinusoidal positions' function of a native module: Python's arguments into its parameter struct.
#pragma once

#include "checks.h"
#include "sinusoidal.h"

namespace fusedattn::bindings {

template <>
inline void check(const Sinusoidal& p) {
  const int64_t batch = p.x.shape[0], length = p.x.shape[1];
  const Sizes full = {batch, length, p.x.shape[2]};
  Argument("x", p.x).given().filled().shape(full).floating();
  Argument("positions", p.positions).shape({p.positions.shape[0] == 1 ? 1 : batch, length});
  Argument("positions", p.positions).integer();
  Argument("offset", p.offset).shape({1}).integer();
  Argument("out", p.out).given().shape(full).dtype(p.dtype());
}

// `config` is SinusoidalConfig of fusedattn/ops/sinusoidal.py.
inline void bind_sinusoidal(py::module_& m, void (*forward)(const Sinusoidal&, Stream)) {
  m.def(
      "sinusoidal_forward",
      [forward](py::handle x, py::handle positions, py::handle offset, py::handle out,
                const py::tuple& config, Stream stream) {
        Sinusoidal params;
        Reader read;
        params.x = read.view("x", x);
        params.positions = read.broadcast("positions", positions);
        params.offset = read.view("offset", offset);
        params.out = read.view("out", out);
        params.options.base = config[0].cast<double>();
        params.options.scale = config[1].cast<double>();
        params.options.offset = config[2].cast<int64_t>();
        run_checked(forward, params, stream);
      },
      py::arg("x"), py::arg("positions"), py::arg("offset"), py::arg("out"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out.");
}

}  // namespace fusedattn::bindings
