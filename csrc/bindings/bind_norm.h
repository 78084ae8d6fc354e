// The norms' functions of a native module: Python's arguments into their parameter structs.
#pragma once

#include "norm.h"
#include "tensor.h"

namespace fusedattn::bindings {

// NormConfig of fusedattn/ops/norm_config.py.
inline NormOptions norm_options(const py::tuple& config) {
  return {config[0].cast<bool>(), config[1].cast<double>(), config[2].cast<double>(),
          config[3].cast<double>()};
}

inline void bind_norm(py::module_& m, void (*forward)(const NormForward&, Stream),
                      void (*backward)(const NormBackward&, Stream)) {
  m.def(
      "norm_forward",
      [forward](py::handle x, py::handle residual, py::handle weight, py::handle bias,
                py::handle seed, py::handle out, py::handle z, py::handle mean, py::handle rstd,
                const py::tuple& config, Stream stream) {
        const NormForward params{matrix_view(x), matrix_view(residual), view(weight),   view(bias),
                                 view(seed),     matrix_view(out),      matrix_view(z), view(mean),
                                 view(rstd),     norm_options(config)};
        const WithoutGil release;
        forward(params, stream);
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("seed"),
      py::arg("out"), py::arg("z"), py::arg("mean"), py::arg("rstd"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out and, where given, z, mean and rstd.");
  m.def(
      "norm_backward",
      [backward](py::handle dout, py::handle dz, py::handle z, py::handle weight, py::handle mean,
                 py::handle rstd, py::handle seed, py::handle dx, py::handle dresidual,
                 py::handle dweight, py::handle dbias, const py::tuple& config, Stream stream) {
        const NormBackward params{matrix_view(dout), matrix_view(dz), matrix_view(z),
                                  view(weight),      view(mean),      view(rstd),
                                  view(seed),        matrix_view(dx), matrix_view(dresidual),
                                  view(dweight),     view(dbias),     norm_options(config)};
        const WithoutGil release;
        backward(params, stream);
      },
      py::arg("dout"), py::arg("dz"), py::arg("z"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("seed"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"),
      py::arg("dbias"), py::arg("config"), py::arg("stream") = Stream(0),
      "Writes dx and, where given, dresidual, dweight and dbias.");
}

}  // namespace fusedattn::bindings
