// Softmax's functions of a native module: Python's arguments into its parameter structs.
#pragma once

#include "checks.h"
#include "softmax.h"

namespace fusedattn::bindings {

// Tensors of fewer than four dimensions are those of four whose first ones have size 1.
constexpr Align last = Align::last;

// `config` is SoftmaxConfig of fusedattn/ops/softmax_config.py.
inline SoftmaxOptions softmax_options(const py::tuple& config) {
  return {causal_of<SoftmaxCausal>(config[0]), config[1].cast<double>()};
}

template <>
inline void check(const SoftmaxForward& p) {
  const int64_t* n = p.x.shape;
  const Sizes full = {n[0], n[1], n[2], n[3]};
  Argument("x", p.x).given().filled().floating();
  Argument("mask", p.mask).broadcasts(full).dtype(DType::boolean);
  Argument("bias", p.bias).broadcasts(full).floating_beside(p.dtype(), true);
  Argument("out", p.out).given().shape(full).dtype(p.dtype());
}

template <>
inline void check(const SoftmaxBackward& p) {
  const int64_t* n = p.out.shape;
  const Sizes full = {n[0], n[1], n[2], n[3]};
  Argument("out", p.out).given().filled().floating();
  Argument("dout", p.dout).given().shape(full).dtype(p.dtype());
  Argument("dx", p.dx).shape(full).dtype(p.dtype());
  Argument("ds", p.ds).shape(full).dtype(wide(p.dtype()));
}

inline void bind_softmax(py::module_& m, void (*forward)(const SoftmaxForward&, Stream),
                         void (*backward)(const SoftmaxBackward&, Stream)) {
  m.def(
      "softmax_forward",
      [forward](py::handle x, py::handle mask, py::handle bias, py::handle out,
                const py::tuple& config, Stream stream) {
        Reader read;
        const SoftmaxForward params{read.view("x", x, last), read.broadcast("mask", mask, last),
                                    read.broadcast("bias", bias, last), read.view("out", out, last),
                                    softmax_options(config)};
        run_checked(forward, params, stream);
      },
      py::arg("x"), py::arg("mask"), py::arg("bias"), py::arg("out"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out.");
  m.def(
      "softmax_backward",
      [backward](py::handle dout, py::handle out, py::handle dx, py::handle ds,
                 const py::tuple& config, Stream stream) {
        Reader read;
        const SoftmaxBackward params{read.view("dout", dout, last), read.view("out", out, last),
                                     read.view("dx", dx, last), read.view("ds", ds, last),
                                     softmax_options(config)};
        run_checked(backward, params, stream);
      },
      py::arg("dout"), py::arg("out"), py::arg("dx"), py::arg("ds"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes dx and ds, where given.");
}

}  // namespace fusedattn::bindings
