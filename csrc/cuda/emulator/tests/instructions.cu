// Kernels for the tests of what sm_80 adds: each instruction on its own, and rows that go through a
// pipeline of asynchronous copies, right and again with one planted flaw.
#include "cuda/sm80/instructions.cuh"

#include <string_view>
#include <vector>

#include "bindings/tensor.h"
#include "cuda/emulator/call.h"

namespace fusedattn::cuda {
namespace {

// By name; "" is none.
using Flaw = std::string_view;

struct Tensors {
  TensorView a, b, c, out;
  Flaw flaw;
};

using Chunk = Pack<uint16_t, 8>;

// a (32, 8) of 16 bits: rows of 16 bytes; b (32) int32: which of them a lane names; out (32, 4)
// int32: the registers of each lane.
FUSEDATTN_KERNEL void matrices_kernel(const FUSEDATTN_GRID_CONSTANT Tensors p, bool transposed) {
  Chunk* rows = reinterpret_cast<Chunk*>(shared_memory());
  store_shared(rows + lane(), load<8>(p.a.at<uint16_t>(lane(), 0)));
  sync_warp();
  if (p.flaw == "absent lane" && lane() == 9) return;
  const char* row = reinterpret_cast<const char*>(rows + load(p.b.at<int32_t>(lane(), 0)));
  if (p.flaw == "misaligned source" && lane() == 5) row += 8;
  if (p.flaw == "past shared" && lane() == 6) row += 512;
  Pack<uint32_t, 4> x;
  if (p.flaw == "diverged" ? lane() < 16 : transposed)
    x = load_matrices_transposed(row);
  else
    x = load_matrices(row);
  store(p.out.at<uint32_t>(lane(), 0), x);
}

// a (n, 32, 4) int32, b (n, 32, 2) int32, c and out (n, 32, 4) float32: fragments of n products,
// one to a warp.
template <class T>
FUSEDATTN_KERNEL void mma_kernel(const FUSEDATTN_GRID_CONSTANT Tensors p) {
  using Other = std::conditional_t<std::is_same_v<T, f16>, bf16, f16>;
  const int64_t n = block() * (block_size() / warp_size) + warp();
  if (p.flaw == "absent lane" && lane() == 9) return;
  auto c = load<4>(p.c.at<float>(n, lane()));
  const auto a = load<4>(p.a.at<uint32_t>(n, lane()));
  const auto b = load<2>(p.b.at<uint32_t>(n, lane()));
  if (p.flaw == "two dtypes" && lane() == 3)
    mma<Other>(c, a, b[0], b[1]);
  else
    mma<T>(c, a, b[0], b[1]);
  store(p.out.at<float>(n, lane()), c);
}

// a (32, 2) float32, out (32) int32.
template <class T>
FUSEDATTN_KERNEL void pair_kernel(const FUSEDATTN_GRID_CONSTANT Tensors p) {
  const auto x = load<2>(p.a.at<float>(block() * warp_size + lane(), 0));
  store(p.out.at<uint32_t>(block() * warp_size + lane(), 0), pair<T>(x[0], x[1]));
}

constexpr int stages = 3;

// Rows of a and out (rows, width) of 16 bits, in chunks of 8 elements: a thread has a column of
// chunks, of which those past `width` are zeros, and writes what the thread across from it has
// copied. Three rows are on their way at a time.
FUSEDATTN_KERNEL void pipeline_kernel(const FUSEDATTN_GRID_CONSTANT Tensors p) {
  Chunk* shared = reinterpret_cast<Chunk*>(shared_memory());
  const int rows = int(p.a.shape[0]), width = int(p.a.shape[1]), i = thread();
  const Flaw flaw = p.flaw;
  const auto copy = [&](int row) {
    const bool exists = row < rows && 8 * i < width;
    const uint16_t* from = p.a.at<uint16_t>(row, 8 * i);
    char* to = reinterpret_cast<char*>(shared + row % stages * block_size() + i);
    if (flaw == "misaligned source" && i == 3) from += 4;
    if (flaw == "misaligned zeros" && !exists) from += 4;
    if (flaw == "misaligned destination" && i == 3) to += 8;
    if (flaw == "past shared" && row == 2) to += 16;
    if (flaw == "into global" && i == 3) to = static_cast<char*>(p.out.data);
    copy_async(to, from, exists || (flaw == "past the end" && row == rows - 1));
    if (flaw == "copied twice" && row == 4 && i > 0) copy_async(to - 16, from - 8, exists);
    commit_copies();
  };
  for (int row = 0; row < stages - 1; ++row) copy(row);
  for (int row = 0; row < rows; ++row) {
    sync_block();
    copy(row + stages - 1);
    if (flaw == "store in flight" && row == 3)
      store_shared(shared + (row + 2) % stages * block_size() + i, Chunk());
    wait_copies<stages - 1>();
    sync_block();
    const int other = block_size() - 1 - i;
    const Chunk chunk = load_shared(shared + row % stages * block_size() + other);
    store(p.out.at<uint16_t>(row, 8 * i), chunk);
  }
}

// What a wait lands: the first row of `a` in three groups, and `a` overwritten by its second row
// between the waits, so that out (2, width) shows when each group was read.
FUSEDATTN_KERNEL void late_kernel(const FUSEDATTN_GRID_CONSTANT Tensors p) {
  Chunk* shared = reinterpret_cast<Chunk*>(shared_memory());
  Chunk* a = p.a.at<Chunk>(0, 0);
  Chunk* out = p.out.at<Chunk>(0, 0);
  if (thread() > 0) return;
  for (int i = 0; i < 3; ++i) {
    copy_async(shared + i, a + i, true);
    commit_copies();
  }
  copy_async(shared + 3, a + 3, true);
  wait_copies<1>();
  for (int i = 0; i < 4; ++i) store(a + i, load(a + 4 + i));
  wait_copies<0>();
  for (int i = 0; i < 3; ++i) store(out + i, load_shared(shared + i));
  commit_copies();
  wait_copies<0>();
  store(out + 3, load_shared(shared + 3));
}

void run_instructions(const std::string& kernel, const pybind11::list& inputs, pybind11::handle out,
                      const std::string& flaw) {
  TensorView views[3];
  bindings::Reader read;
  for (size_t i = 0; i < inputs.size(); ++i) views[i] = read.view("input", inputs[i]);
  const Tensors p = {views[0], views[1], views[2], read.view("out", out), flaw};
  Launch shape = {.grid = 1, .block = 32, .shared_bytes = 512};
  std::vector<TensorView> outputs = {p.out};
  if (kernel == "late") outputs.push_back(p.a);  // which it writes as well
  emulator::checked_call(outputs, [&] {
    if (kernel == "matrices") return launch("matrices", matrices_kernel, shape, p, false);
    if (kernel == "transposed") return launch("matrices", matrices_kernel, shape, p, true);
    if (kernel == "late") return launch("late", late_kernel, shape, p);
    if (kernel == "pipeline") {
      shape.block = int(p.out.shape[1] / 8);
      shape.shared_bytes = stages * shape.block * 16;
      return launch("pipeline", pipeline_kernel, shape, p);
    }
    if (kernel == "pair f16" || kernel == "pair bf16") {
      shape.grid = p.a.shape[0] / 32;
      return launch("pair", kernel == "pair f16" ? pair_kernel<f16> : pair_kernel<bf16>, shape, p);
    }
    shape.block = 64;
    shape.grid = p.a.shape[0] / 2;
    launch("mma", kernel == "mma f16" ? mma_kernel<f16> : mma_kernel<bf16>, shape, p);
  });
}

}  // namespace
}  // namespace fusedattn::cuda

namespace fusedattn::emulator {

void bind_instructions(pybind11::module_& m) {
  m.def("instructions", &cuda::run_instructions, pybind11::arg("kernel"), pybind11::arg("inputs"),
        pybind11::arg("out"), pybind11::arg("flaw") = "",
        "Runs a kernel of the tests of what sm_80 adds.");
}

}  // namespace fusedattn::emulator
