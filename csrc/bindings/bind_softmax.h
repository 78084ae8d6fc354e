// Softmax's calls as parameter structs, and what they have to be.
#pragma once

#include "call.h"
#include "softmax.h"

namespace fusedattn::bindings {

// SoftmaxCall and SoftmaxConfig of fusedattn/ops/softmax_config.py. Tensors of fewer than four
// dimensions are those of four whose first ones have size 1.
template <>
struct Call<SoftmaxForward> {
  using P = SoftmaxForward;
  static constexpr const char* name = "softmax_forward";
  static constexpr Field<P> fields[] = {{"x", &P::x, Read::last},
                                        {"mask", &P::mask, Read::broadcast_last},
                                        {"bias", &P::bias, Read::broadcast_last},
                                        {"dim", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"out", &P::out, Read::last}};
  static constexpr auto config =
      std::tuple(Option{"causal", &SoftmaxOptions::causal, SoftmaxCausal::bottom_right},
                 Option{"scale", &SoftmaxOptions::scale});
};

// SoftmaxBackwardCall.
template <>
struct Call<SoftmaxBackward> {
  using P = SoftmaxBackward;
  static constexpr const char* name = "softmax_backward";
  static constexpr Field<P> fields[] = {{"dout", &P::dout, Read::last},
                                        {"out", &P::out, Read::last},
                                        {"dim", nullptr, Read::unread},
                                        {"x_grad", nullptr, Read::unread},
                                        {"bias_grad", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"dx", &P::dx, Read::last}, {"ds", &P::ds, Read::last}};
  static constexpr auto config = Call<SoftmaxForward>::config;
};

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

}  // namespace fusedattn::bindings
