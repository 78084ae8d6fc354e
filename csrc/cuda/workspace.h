// Memory for the partial results of one call. It is torch's, asked for through Python: so it is
// counted and given back with torch's own, and right in the capture of a graph.
#pragma once

#include <functional>
#include <memory>

#include "tensor_view.h"

namespace fusedattn::cuda {

// `bytes` on a device, aligned to 16; set by bindings/workspace.h. Once the pointer's last copy is
// gone the memory is free for what comes later on `stream`, on which alone it may be used.
inline std::function<std::shared_ptr<void>(int64_t bytes, int device, Stream stream)> allocate;

class Workspace {
 public:
  // Throws what Python has raised; so it is made before anything is launched.
  Workspace(int64_t bytes, Stream stream, int device) : memory_(allocate(bytes, device, stream)) {}

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  std::shared_ptr<void> memory_;
};

}  // namespace fusedattn::cuda
