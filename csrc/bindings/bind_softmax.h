// Softmax's functions of a native module: Python's arguments into its parameter structs.
#pragma once

#include "softmax.h"
#include "tensor.h"

namespace fusedattn::bindings {

// Tensors of fewer than four dimensions are those of four whose first ones have size 1.
constexpr Align last = Align::last;

// `config` is SoftmaxConfig of fusedattn/ops/softmax_config.py.
inline SoftmaxOptions softmax_options(const py::tuple& config) {
  return {SoftmaxCausal(config[0].cast<int>()), config[1].cast<double>()};
}

inline void bind_softmax(py::module_& m, void (*forward)(const SoftmaxForward&, Stream),
                         void (*backward)(const SoftmaxBackward&, Stream)) {
  m.def(
      "softmax_forward",
      [forward](py::handle x, py::handle mask, py::handle bias, py::handle out,
                const py::tuple& config, Stream stream) {
        const SoftmaxForward params{view(x, last), broadcast_view(mask, last),
                                    broadcast_view(bias, last), view(out, last),
                                    softmax_options(config)};
        const WithoutGil release;
        forward(params, stream);
      },
      py::arg("x"), py::arg("mask"), py::arg("bias"), py::arg("out"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out.");
  m.def(
      "softmax_backward",
      [backward](py::handle dout, py::handle out, py::handle dx, py::handle ds,
                 const py::tuple& config, Stream stream) {
        const SoftmaxBackward params{view(dout, last), view(out, last), view(dx, last),
                                     view(ds, last), softmax_options(config)};
        const WithoutGil release;
        backward(params, stream);
      },
      py::arg("dout"), py::arg("out"), py::arg("dx"), py::arg("ds"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes dx and ds, where given.");
}

}  // namespace fusedattn::bindings
