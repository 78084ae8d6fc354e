// The workspaces of CUDA kernels from Python, of both modules that have them.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/workspace.h"

namespace fusedattn::bindings {

// `watched` makes of an allocator the one that kernels use.
template <class Watched>
void bind_allocator(pybind11::module_& m, const Watched& watched) {
  namespace py = pybind11;
  m.def(
      "allocate_by",
      [watched](py::function function) {
        const py::handle kept = function.release();  // as long as the module
        cuda::allocate = watched([kept](int64_t bytes, int device, Stream stream) {
          const py::gil_scoped_acquire held;  // a call lets other threads run
          py::object tensor = kept(bytes, device, stream);
          void* data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
          return std::shared_ptr<void>(data, [owner = tensor.release()](void*) {
            const py::gil_scoped_acquire held;
            owner.dec_ref();
          });
        });
      },
      py::arg("function"),
      "Workspaces are what function(bytes, device, stream) returns: a tensor that only what is on "
      "that stream uses while it lives, and what comes later on it afterwards.");
}

}  // namespace fusedattn::bindings
