// Flaws that the tests plant in kernels while they run: at one place of a kernel a wait, a barrier,
// an address or a tile is wrong. The kernels are those that the GPU gets; the words that they use
// ask here whether to be wrong.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "cuda/attention_schedule.h"

namespace fusedattn::emulator {

using Where = std::source_location;

enum class Flaw : uint8_t {
  no_barrier,
  no_wait,
  wait_for_one_less,  // group of copies
  no_commit,
  no_zeros,       // where a copy has nothing to read the place keeps what it holds
  copies_anyway,  // … or what lies there is read
  wrong_swizzle,  // in every other 128 bytes of shared memory, two neighbouring chunks change
                  // places
  next_place,     // in shared memory, for the right one
  no_shuffle,     // each lane keeps its own
  own_block,      // in place of another one of the cluster
  bound_too_high,
  bound_too_low,
  no_atomic,   // addition but a load and a store
  late_begin,  // of the tiles that are visited: the first one is left out
  early_end,   // the last one is
  early_full,  // the last tile before those that need no mask gets none
  late_full,   // the first one after them gets none
};

// Until the next watch() note which flaws the kernels that run could have.
void watch();
// Those, as "kernel: flaw, place"; notes no more.
std::vector<std::string> flaws();
// Kernels have one of them from here on; -1: none.
void plant(int flaw);

// What the kernels' launcher says.
void enter_kernel(const char* name);

extern bool flaws_matter;
bool has_flaw(Flaw flaw, const Where& where);

// Whether the kernel is to be wrong here. Of copies and addresses each inlined instance in
// the kernel is a place of its own, so what asks is inlined too.
[[gnu::always_inline]] inline bool flawed(Flaw flaw, const Where& where) {
  return __builtin_expect(flaws_matter, false) && has_flaw(flaw, where);
}

// The address in shared memory that is accessed for `at`.
template <class T>
[[gnu::always_inline]] inline T* swizzled(T* at, const Where& where) {
  if (!flawed(Flaw::wrong_swizzle, where)) return at;
  const auto address = reinterpret_cast<uintptr_t>(at);
  return reinterpret_cast<T*>(address ^ (address & 128 ? 32 : 16));
}

// The tiles that are visited.
cuda::Tiles visited(cuda::Tiles tiles, const Where& where);

}  // namespace fusedattn::emulator
