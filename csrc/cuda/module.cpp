// The Python module fusedattn._cuda: tensors in, by DLPack; kernels on the stream of the call. The
// CUDA runtime is linked statically and looks for the driver on the first launch, so the module
// loads where there is neither.
#include <pybind11/stl.h>

#include "bindings/bind_all.h"
#include "bindings/workspace.h"
#include "cuda/kernels.h"
#include "cuda/targets.h"

// Of the runtime, which is linked in; the compiler of this file does not have CUDA's headers.
extern "C" int cudaRuntimeGetVersion(int*);
extern "C" int cudaDriverGetVersion(int*);

PYBIND11_MODULE(_cuda, m) {
  using namespace fusedattn;
  m.doc() = "CUDA kernels. fusedattn.ops checks their arguments first, and says more.";
  bindings::import_exchange(dlpack::device_cuda);
  bindings::bind_all(m, [](const auto& params, Stream stream) { cuda::run(params, stream); });
  bindings::bind_allocator(m, std::identity());
  m.def(
      "attention_tiles",
      [] {
        pybind11::list rows;
        for (const cuda::AttentionTiles& row : cuda::attention_tiles())
          rows.append(pybind11::make_tuple(row.kernel, row.head_dim, row.variant, row.threads,
                                           row.blocks, row.shared_bytes));
        return rows;
      },
      "Rows of sm80/attention_config.h: kernel, head dim, variant, threads, blocks, shared "
      "bytes.");
  m.def("architectures", &cuda::architectures, "Compute capabilities (80, 90, …) compiled for.");
  m.def("runs_on", &cuda::runs_on, pybind11::arg("capability"),
        "Whether a GPU of this compute capability (10 · major + minor) can run the kernels.");
  m.def(
      "versions",
      [] {
        int runtime = 0, driver = 0;
        (void)cudaRuntimeGetVersion(&runtime);
        (void)cudaDriverGetVersion(&driver);
        return std::pair(runtime, driver);
      },
      "Releases of CUDA, 1000 · major + 10 · minor: of the runtime that is linked in, and the "
      "latest that the driver knows, 0 without one.");
}
