// One call of an op under the emulator.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "cuda/kernels.h"
#include "memory.h"

namespace fusedattn::emulator {

// Of a call that begins; null before the first one, for another may have been refused midway.
inline void add_tensor(const TensorView* view) {
  view == nullptr ? Memory::here().clear() : Memory::here().add_tensor(*view);
}

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
  constexpr const auto& fields = bindings::Call<Params>::outputs;
  std::array<TensorView, std::size(fields)> outputs;
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = params.*fields[i].to;
  checked_call(outputs, [&] { cuda::run(params, stream); });
}

// An allocator of the same memory, which the emulator fills with NaN and watches.
template <class Allocate>
auto watched(const Allocate& allocate) {
  return [allocate](int64_t bytes, int device, Stream stream) {
    const std::shared_ptr<void> memory = allocate(bytes, device, stream);
    Memory::here().add_workspace(memory.get(), bytes);
    return std::shared_ptr<void>(memory.get(),
                                 [memory](void* data) { Memory::here().remove_workspace(data); });
  };
}

}  // namespace fusedattn::emulator
