// The norms' calls as parameter structs, and what they have to be.
#pragma once

#include "call.h"
#include "norm.h"

namespace fusedattn::bindings {

// NormCall and NormConfig of fusedattn/ops/norm_config.py.
template <>
struct Call<NormForward> {
  using P = NormForward;
  static constexpr const char* name = "norm_forward";
  static constexpr Field<P> fields[] = {{"x", &P::x, Read::matrix},
                                        {"residual", &P::residual, Read::matrix},
                                        {"weight", &P::weight},
                                        {"bias", &P::bias},
                                        {"seed", &P::seed},
                                        {"dims", nullptr, Read::unread},
                                        {"z_dtype", nullptr, Read::unread},
                                        {"statistics", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"out", &P::out, Read::matrix},
                                         {"z", &P::z, Read::matrix},
                                         {"mean", &P::mean},
                                         {"rstd", &P::rstd}};
  static constexpr auto config =
      std::tuple(Option{"centre", &NormOptions::centre}, Option{"eps", &NormOptions::eps},
                 Option{"weight_offset", &NormOptions::weight_offset},
                 Option{"dropout_p", &NormOptions::dropout_p});
};

// NormBackwardCall.
template <>
struct Call<NormBackward> {
  using P = NormBackward;
  static constexpr const char* name = "norm_backward";
  static constexpr Field<P> fields[] = {{"dout", &P::dout, Read::matrix},
                                        {"dz", &P::dz, Read::matrix},
                                        {"z", &P::z, Read::matrix},
                                        {"weight", &P::weight},
                                        {"mean", &P::mean},
                                        {"rstd", &P::rstd},
                                        {"seed", &P::seed},
                                        {"dims", nullptr, Read::unread},
                                        {"x_dtype", nullptr, Read::unread},
                                        {"residual_dtype", nullptr, Read::unread},
                                        {"weight_dtype", nullptr, Read::unread},
                                        {"bias_dtype", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"dx", &P::dx, Read::matrix},
                                         {"dresidual", &P::dresidual, Read::matrix},
                                         {"dweight", &P::dweight},
                                         {"dbias", &P::dbias}};
  static constexpr auto config = Call<NormForward>::config;
};

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

}  // namespace fusedattn::bindings
