// The Python module fusedattn._cpu: tensors in, by DLPack; the kernels of the best instruction set.
#include <omp.h>
#include <pybind11/stl.h>

#include "bindings/bind_all.h"
#include "bindings/usual.h"
#include "cache.h"
#include "dispatch.h"
#include "workspace.h"

namespace fusedattn {
namespace {

struct OnCpu {
  template <class Params>
  void operator()(const Params& params, Stream) const {
    run(params);
  }
};

}  // namespace
}  // namespace fusedattn

PYBIND11_MODULE(_cpu, m) {
  using namespace fusedattn;
  m.doc() = "Native CPU kernels. fusedattn.ops checks their arguments first, and says more.";
  // What is found out once stands before any call: a fork in the middle of that would leave the
  // child to wait for a thread it does not have.
  available_sets();
  cache_bytes(1);
  bindings::import_exchange();
  bindings::bind_all(m, OnCpu());
  bindings::bind<AttentionJvp>(m, OnCpu());
  bindings::import_usual();
  bindings::bind_usual_norm(m, OnCpu());
  bindings::bind_usual_softmax(m, OnCpu());
  m.def("instruction_sets", &instruction_sets,
        "Names of the instruction sets usable on this processor, simplest first.");
  m.def("select_instruction_set", &select_instruction_set, pybind11::arg("name"),
        "Use no better instruction set than this; 'auto' lifts the limit. For tests.");
  m.def("cache_bytes", &cache_bytes, pybind11::arg("threads"),
        "Bytes of the last level of cache that so many threads have between them.");
  m.def("assume_cache_bytes", &assume_cache_bytes, pybind11::arg("bytes"),
        "Reckon with so many bytes of cache; 0 lifts that. For tests.");
  m.def("fill_workspace", &fill_workspace, pybind11::arg("on"),
        "Fill scratch memory with NaN before each call. For tests.");
  m.def("openmp_threads", &omp_get_max_threads, "Threads that a kernel uses.");
}
