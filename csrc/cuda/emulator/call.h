// One call of an op under the emulator.
#pragma once

#include <stdexcept>

#include "cuda/kernels.h"
#include "memory.h"

namespace fusedattn::emulator {

inline void add_tensor(const TensorView& view, bool output) {
  Memory::here().add_tensor(view, output);
}

// Run kernels on the tensors that the binding has read; then every element of an output must have
// been written.
template <class Function>
void checked_call(const Function& kernels) {
  struct Forget {
    ~Forget() { Memory::here().clear(); }
  } at_the_end;
  kernels();
  const std::string missing = Memory::here().unwritten();
  if (!missing.empty()) throw std::runtime_error("emulator: no kernel has written " + missing);
}

template <class Params>
void checked(const Params& params, Stream stream) {
  checked_call([&] { cuda::run(params, stream); });
}

}  // namespace fusedattn::emulator
