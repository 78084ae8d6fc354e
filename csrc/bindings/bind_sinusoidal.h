// Sinusoidal positions' function of a native module: Python's arguments into its parameter struct.
#pragma once

#include "sinusoidal.h"
#include "tensor.h"

namespace fusedattn::bindings {

// `config` is SinusoidalConfig of fusedattn/ops/sinusoidal.py.
inline void bind_sinusoidal(py::module_& m, void (*forward)(const Sinusoidal&, Stream)) {
  m.def(
      "sinusoidal_forward",
      [forward](py::handle x, py::handle positions, py::handle offset, py::handle out,
                const py::tuple& config, Stream stream) {
        Sinusoidal params;
        params.x = view(x);
        params.positions = broadcast_view(positions);
        params.offset = view(offset);
        params.out = view(out);
        params.options.base = config[0].cast<double>();
        params.options.scale = config[1].cast<double>();
        params.options.offset = config[2].cast<int64_t>();
        const WithoutGil release;
        forward(params, stream);
      },
      py::arg("x"), py::arg("positions"), py::arg("offset"), py::arg("out"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out.");
}

}  // namespace fusedattn::bindings
