// Kernels for the tests of the emulator: right ones, and each again with one planted flaw.
#include <string_view>

#include "bindings/tensor.h"
#include "cuda/common.cuh"
#include "cuda/emulator/call.h"

namespace fusedattn::cuda {
namespace {

// By name; "" is none.
using Flaw = std::string_view;

struct Rows {
  TensorView x, out;  // (rows, width) float32
  Flaw flaw;
};

// Every row reversed by way of shared memory: one block to a row, one thread to an element.
FUSEDATTN_KERNEL void reverse_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  float* row = reinterpret_cast<float*>(shared_memory());
  const float* x = p.x.at<float>(block(), 0);
  float* out = p.out.at<float>(block(), 0);
  const int i = thread(), last = int(p.x.shape[1]) - 1;
  if (p.flaw == "ended lane" && i == 40) return;
  store_shared(row + i + (p.flaw == "past shared" && i == last), load(x + i));
  if (p.flaw == "divergent barrier") {
    if (i != 7) sync_block();
  } else if (p.flaw == "two barriers") {
    if (i < 32)
      sync_block();
    else
      sync_block();
  } else {
    sync_block();
  }
  const float value =
      p.flaw == "shared as global" ? load(row + last - i) : load_shared(row + last - i);
  store(out + i, value);
}

// A copy in packs of four.
FUSEDATTN_KERNEL void copy_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  float* x = p.x.at<float>(block(), 0);
  float* out = p.out.at<float>(block(), 0);
  const int width = int(p.x.shape[1]);
  for (int i = 4 * thread(); i < width; i += 4 * block_size()) {
    auto pack = load<4>(x + i + (p.flaw == "misaligned" && i == 8 ? 1 : 0));
    const bool last = i == width - 4;
    if (p.flaw == "unwritten" && last && block() == grid_size() - 1) continue;
    store(out + i, pack);
    if (last && p.flaw == "past the end" && block() == grid_size() - 1) store(out + i + 4, pack);
    if (last && p.flaw == "in a gap") store(out + i + 4, 0.0f);
    if (last && p.flaw == "written input") store(x + i, pack);
  }
}

FUSEDATTN_DEVICE float warp_sum(float x, Flaw flaw) {
  if (flaw == "mismatched shuffle" && lane() == 3) return shuffle_down(x, 16);
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum of all elements into out[0, 0], the others of out are written as they are.
FUSEDATTN_KERNEL void sum_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  const float x = load(p.x.at<float>(block(), thread()));
  const float sum = warp_sum(x, p.flaw);
  float* out = p.out.at<float>(0, 0);
  if (lane() == 0) atomic_add(out, sum);
}

// The mean of the two rows of a cluster into both.
FUSEDATTN_KERNEL void exchange_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  float* row = reinterpret_cast<float*>(shared_memory());
  const int i = thread();
  const float mine = load(p.x.at<float>(block(), i));
  store_shared(row + i, mine);
  if (p.flaw != "no first cluster barrier") sync_cluster();
  const float other = load_remote(remote_shared(row + i, cluster_rank() ^ 1));
  if (p.flaw != "no last cluster barrier") sync_cluster();
  store(p.out.at<float>(block(), i), 0.5f * (mine + other));
}

// The number of the block and thread, in the order in which they run.
FUSEDATTN_KERNEL void order_kernel(const FUSEDATTN_GRID_CONSTANT Rows p, int* next) {
  store(p.out.at<float>(0, (*next)++), float(block() * block_size() + thread()));
}

// Sums of 32 numbers by way of every wrapper of arithmetic and conversion.
FUSEDATTN_KERNEL void round_trip_kernel(const FUSEDATTN_GRID_CONSTANT Rows p, bool half) {
  const auto x = load<4>(p.x.at<float>(block(), 4 * thread()));
  float* out = p.out.at<float>(block(), 4 * thread());
  store(out, half ? widen(narrow<f16>(x)) : widen(narrow<bf16>(x)));
}

void run_planted(const std::string& kernel, pybind11::handle x, pybind11::handle out,
                 const std::string& flaw) {
  bindings::Reader read;
  const Rows p = {read.view("x", x), read.view("out", out), flaw};
  const int width = int(p.x.shape[1]);
  Launch shape = {.grid = p.x.shape[0], .block = width, .shared_bytes = width * 4};
  emulator::checked_call(std::array{p.out}, [&] {
    if (kernel == "reverse") return launch("reverse", reverse_kernel, shape, p);
    if (kernel == "sum") {
      set_zero(p.out.data, p.out.shape[0] * p.out.shape[1] * 4, 0, 0);
      return launch("sum", sum_kernel, shape, p);
    }
    shape.block = 32;
    if (kernel == "copy") return launch("copy", copy_kernel, shape, p);
    if (kernel == "to f16") return launch("to f16", round_trip_kernel, shape, p, true);
    if (kernel == "to bf16") return launch("to bf16", round_trip_kernel, shape, p, false);
    shape.block = width;
    if (kernel == "order") {
      int next = 0;
      shape.shared_bytes = 0;
      return launch("order", order_kernel, shape, p, &next);
    }
    shape.cluster = 2;
    launch("exchange", exchange_kernel, shape, p);
  });
}

}  // namespace
}  // namespace fusedattn::cuda

namespace fusedattn::emulator {

void bind_planted(pybind11::module_& m) {
  m.def("planted", &cuda::run_planted, pybind11::arg("kernel"), pybind11::arg("x"),
        pybind11::arg("out"), pybind11::arg("flaw") = "", "Runs a kernel of the emulator's tests.");
}

}  // namespace fusedattn::emulator
