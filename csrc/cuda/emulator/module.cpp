// The Python module fusedattn._cuda_emulated: _cuda's functions on the emulator, for the tests.
#include <pybind11/stl.h>

#include "bindings/bind_all.h"
#include "bindings/workspace.h"
#include "cuda/emulator/call.h"
#include "cuda/emulator/flaws.h"
#include "cuda/emulator/machine.h"
#include "cuda/kernels.h"

namespace fusedattn::emulator {

// Of tests/<name>.cu.
void bind_instructions(pybind11::module_& m);
void bind_planted(pybind11::module_& m);
void bind_schedule(pybind11::module_& m);

}  // namespace fusedattn::emulator

PYBIND11_MODULE(_cuda_emulated, m) {
  using namespace fusedattn;
  using emulator::checked;
  m.doc() = "The CUDA kernels on a host emulator that checks what they do.";
  bindings::import_exchange();
  bindings::seen = emulator::add_tensor;
  bindings::bind_all(m, [](const auto& params, Stream stream) { checked(params, stream); });
  bindings::bind_allocator(m, [](const auto& allocate) { return emulator::watched(allocate); });
  emulator::bind_instructions(m);
  emulator::bind_planted(m);
  emulator::bind_schedule(m);
  m.def("watch", &emulator::watch, "Note which flaws the kernels that run from here could have.");
  m.def("flaws", &emulator::flaws, "Those; ends the watch.");
  m.def("plant", &emulator::plant, pybind11::arg("flaw") = -1,
        "The kernels have this one, by its place in the list, from here on; -1: none.");
  m.def("seed", &emulator::seed, pybind11::arg("value"), "Seed the orders from here on.");
  m.def("switches", &emulator::switches, "Times that a thread was resumed.");
  m.def(
      "device",
      [](int capability, int multiprocessors, int max_shared_bytes, int cache_bytes) {
        emulator::device = {capability, multiprocessors, max_shared_bytes, cache_bytes};
      },
      pybind11::arg("capability") = 90, pybind11::arg("multiprocessors") = 3,
      pybind11::arg("max_shared_bytes") = 227 * 1024, pybind11::arg("cache_bytes") = 16 << 20,
      "What launchers are told of the device.");
}
