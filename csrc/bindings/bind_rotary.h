// The rotary embedding's call as a parameter struct, and what it has to be.
#pragma once

#include "call.h"
#include "rotary.h"

namespace fusedattn::bindings {

// RotaryCall and RotaryConfig of fusedattn/ops/rotary_config.py; out may be x.
template <>
struct Call<Rotary> {
  using P = Rotary;
  static constexpr const char* name = "rotary_forward";
  static constexpr Field<P> fields[] = {{"x", &P::x},
                                        {"x2", &P::x2},
                                        {"cos", &P::cos, Read::table},
                                        {"sin", &P::sin, Read::table},
                                        {"positions", &P::positions, Read::broadcast},
                                        {"start", &P::offset}};
  static constexpr Field<P> outputs[] = {{"out", &P::out}, {"out2", &P::out2}};
  static constexpr auto config = std::tuple(Option{"interleaved", &RotaryOptions::interleaved},
                                            Option{"inverse", &RotaryOptions::inverse},
                                            Option{"offset", &RotaryOptions::offset});
};

template <>
inline void check(const Rotary& p) {
  const int64_t batch = p.x.shape[0], length = p.x.shape[2], features = p.x.shape[3];
  const Sizes full = {batch, p.x.shape[1], length, features};
  const Sizes second = {batch, p.x2.shape[1], length, features};
  const int64_t half = p.cos.shape[2];
  const Sizes table = {p.cos.shape[0] == 1 ? 1 : batch, p.cos.shape[1], half};
  Argument("x", p.x).given().filled().floating();
  Argument("x2", p.x2).filled().shape(second).dtype(p.dtype());
  Argument("cos", p.cos).given().filled().shape(table).floating();
  Argument("sin", p.sin).given().shape(table).dtype(p.cos.dtype);
  if (2 * half > features)
    throw py::value_error("fusedattn: got cos and sin of " + std::to_string(half) +
                          " columns, expected at most " + std::to_string(features / 2));
  Argument("positions", p.positions).shape({p.positions.shape[0] == 1 ? 1 : batch, length});
  Argument("positions", p.positions).integer();
  Argument("offset", p.offset).shape({1}).integer();
  Argument("out", p.out).given().shape(full).dtype(p.dtype());
  if (p.x2) Argument("out2", p.out2).given();
  Argument("out2", p.out2).shape(second).dtype(p.dtype());
}

}  // namespace fusedattn::bindings
