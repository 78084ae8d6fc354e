// One call of an op under the emulator.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "memory.h"

namespace fusedattn::emulator {

// Of a call that begins; null before the first one, for another may have been refused midway.
inline void add_tensor(const TensorView* view) {
  view == nullptr ? Memory::here().clear() : Memory::here().add_tensor(*view);
}

// What the kernels write.
inline auto outputs(const AttentionForward& p) { return std::array{p.out, p.lse}; }
inline auto outputs(const AttentionBackward& p) { return std::array{p.dq, p.dk, p.dv}; }
inline auto outputs(const NormForward& p) { return std::array{p.out, p.z, p.mean, p.rstd}; }
inline auto outputs(const NormBackward& p) {
  return std::array{p.dx, p.dresidual, p.dweight, p.dbias};
}
inline auto outputs(const SoftmaxForward& p) { return std::array{p.out}; }
inline auto outputs(const SoftmaxBackward& p) { return std::array{p.dx, p.ds}; }
inline auto outputs(const Rotary& p) { return std::array{p.out, p.out2}; }
inline auto outputs(const Sinusoidal& p) { return std::array{p.out}; }

// Run kernels on the tensors that the binding has read, with NaN in every output. At the end each
// element of them must have been written.
template <class Views, class Function>
void checked_call(const Views& outputs, const Function& kernels) {
  struct Forget {
    ~Forget() { Memory::here().clear(); }
  } at_the_end;
  for (const TensorView& each : outputs)
    if (each) Memory::here().mark_output(each);
  kernels();
  const std::string missing = Memory::here().unwritten();
  if (!missing.empty()) throw std::runtime_error("emulator: no kernel has written " + missing);
}

template <class Params>
void checked(const Params& params, Stream stream) {
  checked_call(outputs(params), [&] { cuda::run(params, stream); });
}

}  // namespace fusedattn::emulator
