// SwiGLU's calls as parameter structs, and what they have to be.
#pragma once

#include "call.h"
#include "swiglu.h"

namespace fusedattn::bindings {

// SwigluCall and SwigluConfig of fusedattn/ops/swiglu.py. Tensors of fewer than four dimensions are
// those of four whose first ones have size 1.
template <>
struct Call<SwigluForward> {
  using P = SwigluForward;
  static constexpr const char* name = "swiglu_forward";
  static constexpr Field<P> fields[] = {{"gate", &P::gate, Read::last}, {"up", &P::up, Read::last}};
  static constexpr Field<P> outputs[] = {{"out", &P::out, Read::last}};
  static constexpr auto config =
      std::tuple(Option{"activation", &SwigluOptions::activation, Activation::relu});
};

// SwigluBackwardCall.
template <>
struct Call<SwigluBackward> {
  using P = SwigluBackward;
  static constexpr const char* name = "swiglu_backward";
  static constexpr Field<P> fields[] = {
      {"dout", &P::dout, Read::last}, {"gate", &P::gate, Read::last}, {"up", &P::up, Read::last}};
  static constexpr Field<P> outputs[] = {{"dgate", &P::dgate, Read::last},
                                         {"dup", &P::dup, Read::last}};
  static constexpr auto config = Call<SwigluForward>::config;
};

// gate and up, or their gradients, beside a result of this shape and dtype.
inline void check_gated(const char* gate_name, const TensorView& gate, const char* up_name,
                        const TensorView& up, bool apart, const TensorView& result) {
  const int64_t* n = result.shape;
  const Sizes full = {n[0], n[1], n[2], n[3]}, both = {n[0], n[1], n[2], 2 * n[3]};
  Argument(gate_name, gate).given().shape(apart ? full : both).dtype(result.dtype).dense(3);
  if (apart) Argument(up_name, up).given();
  if (!apart && up)
    throw py::value_error(std::string("fusedattn: got ") + up_name + ", expected none beside " +
                          gate_name + ", which holds both");
  Argument(up_name, up).shape(full).dtype(result.dtype).dense(3);
}

template <>
inline void check(const SwigluForward& p) {
  Argument("out", p.out).given().filled().floating().dense(3);
  check_gated("gate", p.gate, "up", p.up, bool(p.up), p.out);
}

template <>
inline void check(const SwigluBackward& p) {
  Argument("dout", p.dout).given().filled().floating().dense(3);
  check_gated("gate", p.gate, "up", p.up, bool(p.up), p.dout);
  check_gated("dgate", p.dgate, "dup", p.dup, bool(p.up), p.dout);
}

}  // namespace fusedattn::bindings
