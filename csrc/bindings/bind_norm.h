// The norms' functions of a native module: Python's arguments into their parameter structs.
#pragma once

#include "checks.h"
#include "norm.h"

namespace fusedattn::bindings {

// NormConfig of fusedattn/ops/norm_config.py.
inline NormOptions norm_options(const py::tuple& config) {
  return {config[0].cast<bool>(), config[1].cast<double>(), config[2].cast<double>(),
          config[3].cast<double>()};
}

template <>
inline void check(const NormForward& p) {
  const Sizes matrix = {p.rows(), p.width()};
  Argument("x", p.x).given().filled().dense(1).floating();
  Argument("residual", p.residual).shape(matrix).dense(1).floating_beside(p.dtype());
  Argument("weight", p.weight).shape({p.width()}).dense().floating();
  Argument("bias", p.bias).shape({p.width()}).dense().floating();
  Argument("seed", p.seed).shape({1}).dtype(DType::i64);
  Argument("out", p.out).given().shape(matrix).dense(1).dtype(p.dtype());
  if (p.residual || p.seed) Argument("z", p.z).given();
  Argument("z", p.z).shape(matrix).dense(1).floating_beside(p.dtype());
  Argument("mean", p.mean).shape({p.rows()}).dense().dtype(wide(p.dtype()));
  Argument("rstd", p.rstd).shape({p.rows()}).dense().dtype(wide(p.dtype()));
}

template <>
inline void check(const NormBackward& p) {
  const Sizes matrix = {p.rows(), p.width()};
  Argument("dx", p.dx).given().filled().dense(1).floating();
  Argument("dout", p.dout).shape(matrix).dense(1).dtype(p.dtype());
  Argument("dz", p.dz).shape(matrix).dense(1).floating_beside(p.dtype());
  Argument("z", p.z).given().shape(matrix).dense(1).floating_beside(p.dtype());
  Argument("weight", p.weight).shape({p.width()}).dense().floating();
  if (p.options.centre) Argument("mean", p.mean).given();
  Argument("mean", p.mean).shape({p.rows()}).dense().dtype(wide(p.dtype()));
  Argument("rstd", p.rstd).given().shape({p.rows()}).dense().dtype(wide(p.dtype()));
  Argument("seed", p.seed).shape({1}).dtype(DType::i64);
  Argument("dresidual", p.dresidual).shape(matrix).dense(1).floating_beside(p.dtype());
  Argument("dweight", p.dweight).shape({p.width()}).dense().floating();
  Argument("dbias", p.dbias).shape({p.width()}).dense().floating();
}

inline void bind_norm(py::module_& m, void (*forward)(const NormForward&, Stream),
                      void (*backward)(const NormBackward&, Stream)) {
  m.def(
      "norm_forward",
      [forward](py::handle x, py::handle residual, py::handle weight, py::handle bias,
                py::handle seed, py::handle out, py::handle z, py::handle mean, py::handle rstd,
                const py::tuple& config, Stream stream) {
        Reader read;
        const NormForward params{read.matrix("x", x),         read.matrix("residual", residual),
                                 read.view("weight", weight), read.view("bias", bias),
                                 read.view("seed", seed),     read.matrix("out", out),
                                 read.matrix("z", z),         read.view("mean", mean),
                                 read.view("rstd", rstd),     norm_options(config)};
        run_checked(forward, params, stream);
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("seed"),
      py::arg("out"), py::arg("z"), py::arg("mean"), py::arg("rstd"), py::arg("config"),
      py::arg("stream") = Stream(0), "Writes out and, where given, z, mean and rstd.");
  m.def(
      "norm_backward",
      [backward](py::handle dout, py::handle dz, py::handle z, py::handle weight, py::handle mean,
                 py::handle rstd, py::handle seed, py::handle dx, py::handle dresidual,
                 py::handle dweight, py::handle dbias, const py::tuple& config, Stream stream) {
        Reader read;
        const NormBackward params{read.matrix("dout", dout),
                                  read.matrix("dz", dz),
                                  read.matrix("z", z),
                                  read.view("weight", weight),
                                  read.view("mean", mean),
                                  read.view("rstd", rstd),
                                  read.view("seed", seed),
                                  read.matrix("dx", dx),
                                  read.matrix("dresidual", dresidual),
                                  read.view("dweight", dweight),
                                  read.view("dbias", dbias),
                                  norm_options(config)};
        run_checked(backward, params, stream);
      },
      py::arg("dout"), py::arg("dz"), py::arg("z"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("seed"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"),
      py::arg("dbias"), py::arg("config"), py::arg("stream") = Stream(0),
      "Writes dx and, where given, dresidual, dweight and dbias.");
}

}  // namespace fusedattn::bindings
