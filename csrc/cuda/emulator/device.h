// The names of common.cuh on the host emulator: what device.cuh says with instructions, in C++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "flaws.h"
#include "machine.h"

namespace fusedattn::cuda {

using emulator::Where;

// --- position ------------------------------------------------------------------------------------

inline int thread() { return emulator::position().thread; }
inline int block_size() { return emulator::position().block_size; }
inline int64_t block() { return emulator::position().block; }
inline int64_t grid_size() { return emulator::position().grid_size; }
inline int lane() { return thread() % warp_size; }
inline int warp() { return thread() / warp_size; }

inline int anew(int x) { return x; }

FUSEDATTN_DEVICE bool below(int64_t i, int64_t end, Where where = Where::current()) {
  if (emulator::flawed(emulator::Flaw::bound_too_high, where)) ++end;
  if (emulator::flawed(emulator::Flaw::bound_too_low, where)) --end;
  return i < end;
}

// --- barriers and shuffles -----------------------------------------------------------------------

inline void sync_block(Where where = Where::current()) {
  if (!emulator::flawed(emulator::Flaw::no_barrier, where)) emulator::sync_block(where);
}
inline void sync_warp(Where where = Where::current()) {
  if (!emulator::flawed(emulator::Flaw::no_barrier, where)) emulator::sync_warp(where);
}

template <class T>
T shuffle(T x, int from, Where where = Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (emulator::flawed(emulator::Flaw::no_shuffle, where)) return x;
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = emulator::shuffle(bits, sizeof(T), from, where);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
T shuffle_xor(T x, int mask, Where where = Where::current()) {
  return shuffle(x, lane() ^ mask, where);
}

template <class T>
T shuffle_down(T x, int n, Where where = Where::current()) {
  return shuffle(x, lane() + n < warp_size ? lane() + n : lane(), where);
}

// --- shared memory and clusters ------------------------------------------------------------------

inline char* shared_memory() { return emulator::position().shared; }
inline int cluster_rank() { return emulator::position().cluster_rank; }
inline int cluster_size() { return emulator::position().cluster_size; }
inline void sync_cluster(Where where = Where::current()) {
  if (!emulator::flawed(emulator::Flaw::no_barrier, where)) emulator::sync_cluster(where);
}

template <class T>
T* remote_shared(T* at, int rank, Where where = Where::current()) {
  if (emulator::flawed(emulator::Flaw::own_block, where)) rank = cluster_rank();
  return reinterpret_cast<T*>(emulator::remote_shared(reinterpret_cast<char*>(at), rank));
}

// --- loads, stores, conversions ------------------------------------------------------------------

namespace machine {

template <Space space, class T>
FUSEDATTN_DEVICE T load(const T* from) {
  if constexpr (space == Space::shared)
    from += emulator::flawed(emulator::Flaw::next_place, Where::current());
  emulator::note(from, sizeof(T), space, emulator::Access::load);
  T result;
  std::memcpy(&result, from, sizeof(T));
  return result;
}

template <Space space, class T>
FUSEDATTN_DEVICE void store(T* to, const T& x) {
  if constexpr (space == Space::shared)
    to += emulator::flawed(emulator::Flaw::next_place, Where::current());
  emulator::note(to, sizeof(T), space, emulator::Access::store);
  std::memcpy(to, &x, sizeof(T));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// An exponent of 5 bits becomes one of 8 by a multiplication, which gives subnormal numbers theirs.
inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size >= 0x7c00) return float_of(sign | 0x7f800000 | (size & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(size << 13) * 0x1p112f));
}

inline uint16_t to_f16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = uint16_t(bits_of(x) >> 31 << 15);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;  // halfway above the largest
  // A subnormal number is a count of 2^-24, the last place of floats from 1/2 to 1.
  if (size < 0x1p-14f) return uint16_t(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
  const uint32_t bits = bits_of(size);
  return uint16_t(sign + ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

inline uint32_t to_f16_pair(float low, float high) {
  return to_f16(low) | uint32_t(to_f16(high)) << 16;
}

inline uint32_t to_bf16_pair(float low, float high) {
  return to_bf16(low) | uint32_t(to_bf16(high)) << 16;
}

inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}

}  // namespace machine

namespace machine {

inline void note_atomic(const float* to, int bytes, const Where& where) {
  const bool flawed = emulator::flawed(emulator::Flaw::no_atomic, where);
  emulator::note(to, bytes, Space::global,
                 flawed ? emulator::Access::store : emulator::Access::atomic);
}

}  // namespace machine

inline void atomic_add(float* to, float x, Where where = Where::current()) {
  machine::note_atomic(to, sizeof x, where);
  *to += x;
}

inline bool adds_packs() { return emulator::device.capability >= 90; }

inline void atomic_add(float* to, const Pack<float, 4>& x, Where where = Where::current()) {
  machine::note_atomic(to, sizeof x, where);
  for (int i = 0; i < 4; ++i) to[i] += x[i];
}

inline void atomic_max(float* to, float x, Where where = Where::current()) {
  machine::note_atomic(to, sizeof x, where);
  *to = std::max(*to, x);
}

// --- arithmetic ----------------------------------------------------------------------------------

inline float exp2(float x) { return machine::flush(std::exp2(machine::flush(x))); }
inline float log2(float x) { return std::log2(machine::flush(x)); }
inline float rsqrt(float x) { return float(1 / std::sqrt(double(x))); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

inline void sincospi(float x, float* sine, float* cosine) {
  const double turns = std::remainder(double(x), 2.0);
  *sine = float(std::sin(M_PI * turns));
  *cosine = float(std::cos(M_PI * turns));
}

// --- the host's side -----------------------------------------------------------------------------

inline int multiprocessors(int) { return emulator::device.multiprocessors; }
inline int capability(int) { return emulator::device.capability; }
inline int max_shared_bytes(int) { return emulator::device.max_shared_bytes; }
inline int cache_bytes(int) { return emulator::device.cache_bytes; }

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), const Launch&) {
  return 2;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape,
            const Arguments&... arguments) {
  (void)grid_of(name, shape);
  emulator::run(name, shape, [&] { kernel(Parameters(arguments)...); });
}

inline void set_zero(void* at, int64_t bytes, Stream, int) { emulator::set_zero(at, bytes); }

}  // namespace fusedattn::cuda
