// Sinusoidal positions' call as a parameter struct, and what it has to be.
#pragma once

#include "call.h"
#include "sinusoidal.h"

namespace fusedattn::bindings {

// SinusoidalCall and SinusoidalConfig of fusedattn/ops/sinusoidal.py.
template <>
struct Call<Sinusoidal> {
  using P = Sinusoidal;
  static constexpr const char* name = "sinusoidal_forward";
  static constexpr Field<P> fields[] = {
      {"x", &P::x}, {"positions", &P::positions, Read::broadcast}, {"start", &P::offset}};
  static constexpr Field<P> outputs[] = {{"out", &P::out}};
  static constexpr auto config = std::tuple(Option{"base", &SinusoidalOptions::base},
                                            Option{"scale", &SinusoidalOptions::scale},
                                            Option{"offset", &SinusoidalOptions::offset});
};

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

}  // namespace fusedattn::bindings
