// Kernels for the tests of the emulator: right ones, and each again with one planted flaw.
#include <map>

#include "bindings/tensor.h"
#include "cuda/common.cuh"
#include "cuda/emulator/call.h"

namespace fusedattn::cuda {
namespace {

enum class Flaw {
  none,
  missing_barrier,
  divergent_barrier,
  two_barriers,
  mismatched_shuffle,
  ended_lane,
  past_the_end,
  in_a_gap,
  misaligned,
  unwritten,
  written_input,
  past_shared,
  shared_as_global,
  no_atomic,
  no_first_cluster_barrier,
  no_last_cluster_barrier,
};

const std::map<std::string, Flaw> flaws = {
    {"none", Flaw::none},
    {"missing barrier", Flaw::missing_barrier},
    {"divergent barrier", Flaw::divergent_barrier},
    {"two barriers", Flaw::two_barriers},
    {"mismatched shuffle", Flaw::mismatched_shuffle},
    {"ended lane", Flaw::ended_lane},
    {"past the end", Flaw::past_the_end},
    {"in a gap", Flaw::in_a_gap},
    {"misaligned", Flaw::misaligned},
    {"unwritten", Flaw::unwritten},
    {"written input", Flaw::written_input},
    {"past shared", Flaw::past_shared},
    {"shared as global", Flaw::shared_as_global},
    {"no atomic", Flaw::no_atomic},
    {"no first cluster barrier", Flaw::no_first_cluster_barrier},
    {"no last cluster barrier", Flaw::no_last_cluster_barrier},
};

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
  if (p.flaw == Flaw::ended_lane && i == 40) return;
  store_shared(row + i + (p.flaw == Flaw::past_shared && i == last), load(x + i));
  if (p.flaw == Flaw::divergent_barrier) {
    if (i != 7) sync_block();
  } else if (p.flaw == Flaw::two_barriers) {
    if (i < 32)
      sync_block();
    else
      sync_block();
  } else if (p.flaw != Flaw::missing_barrier) {
    sync_block();
  }
  const float value =
      p.flaw == Flaw::shared_as_global ? load(row + last - i) : load_shared(row + last - i);
  store(out + i, value);
}

// A copy in packs of four.
FUSEDATTN_KERNEL void copy_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  float* x = p.x.at<float>(block(), 0);
  float* out = p.out.at<float>(block(), 0);
  const int width = int(p.x.shape[1]);
  for (int i = 4 * thread(); i < width; i += 4 * block_size()) {
    auto pack = load<4>(x + i + (p.flaw == Flaw::misaligned && i == 8 ? 1 : 0));
    const bool last = i == width - 4;
    if (p.flaw == Flaw::unwritten && last && block() == grid_size() - 1) continue;
    store(out + i, pack);
    if (last && p.flaw == Flaw::past_the_end && block() == grid_size() - 1)
      store(out + i + 4, pack);
    if (last && p.flaw == Flaw::in_a_gap) store(out + i + 4, 0.0f);
    if (last && p.flaw == Flaw::written_input) store(x + i, pack);
  }
}

FUSEDATTN_DEVICE float warp_sum(float x, Flaw flaw) {
  if (flaw == Flaw::mismatched_shuffle && lane() == 3) return shuffle_down(x, 16);
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum of all elements into out[0, 0], the others of out are written as they are.
FUSEDATTN_KERNEL void sum_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  const float x = load(p.x.at<float>(block(), thread()));
  const float sum = warp_sum(x, p.flaw);
  float* out = p.out.at<float>(0, 0);
  if (lane() == 0) {
    if (p.flaw == Flaw::no_atomic)
      store(out, load(out) + sum);
    else
      atomic_add(out, sum);
  }
}

// The mean of the two rows of a cluster into both.
FUSEDATTN_KERNEL void exchange_kernel(const FUSEDATTN_GRID_CONSTANT Rows p) {
  float* row = reinterpret_cast<float*>(shared_memory());
  const int i = thread();
  const float mine = load(p.x.at<float>(block(), i));
  store_shared(row + i, mine);
  if (p.flaw != Flaw::no_first_cluster_barrier) sync_cluster();
  const float other = load_remote(remote_shared(row + i, cluster_rank() ^ 1));
  if (p.flaw != Flaw::no_last_cluster_barrier) sync_cluster();
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
  const Rows p = {bindings::view(x), bindings::view(out), flaws.at(flaw)};
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
        pybind11::arg("out"), pybind11::arg("flaw") = "none",
        "Runs a kernel of the emulator's tests.");
}

}  // namespace fusedattn::emulator
