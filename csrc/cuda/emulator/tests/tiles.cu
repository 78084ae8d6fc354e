// A small attention of the words of sm80/tile.cuh for the tests of the emulator: right, and again
// with one planted flaw of the kind that attention's kernels may have.
#include "cuda/sm80/tile.cuh"

#include <map>

#include "bindings/tensor.h"
#include "cuda/emulator/call.h"

namespace fusedattn::cuda {
namespace {

enum class Flaw {
  none,
  no_wait,
  wait_for_one_less,
  no_barrier_after_wait,
  no_barrier_before_copy,
  no_barrier_before_output,
  no_swizzle,
  shifted_swizzle,
  one_tile_less,
  one_key_more,
  no_zeros,
};

const std::map<std::string, Flaw> flaws = {
    {"none", Flaw::none},
    {"no wait", Flaw::no_wait},
    {"wait for one less", Flaw::wait_for_one_less},
    {"no barrier after wait", Flaw::no_barrier_after_wait},
    {"no barrier before copy", Flaw::no_barrier_before_copy},
    {"no barrier before output", Flaw::no_barrier_before_output},
    {"no swizzle", Flaw::no_swizzle},
    {"shifted swizzle", Flaw::shifted_swizzle},
    {"one tile less", Flaw::one_tile_less},
    {"one key more", Flaw::one_key_more},
    {"no zeros", Flaw::no_zeros},
};

// q (Sq, D), k and v (Sk, D), out (Sq, D) of 16 bits, D at most `columns`.
struct Problem {
  TensorView q, k, v, out;
  float scale;
  Flaw flaw;
};

constexpr int queries = 32, keys = 32, columns = 64, warps = 2, threads = 64, stages = 2;

using Part = Tile<queries, columns>;
using State = Pack<float, 4>;

// What a read believes of the layout where it is wrong.
struct Straight : Part {
  static int swizzle(int) { return 0; }
};
struct Shifted : Part {
  static int swizzle(int row) { return (row + 1) & 7; }
};

template <class T, class Keys>
void scores(State (&s)[1][keys / 8], const Part& q, const Part& k) {
  clear(s);
  multiply<T, columns / 16>(s, OperandA<Part, Sum::along>(q, 16 * warp()),
                            OperandB<Keys, Sum::along>(Keys{k.data}));
}

// Scores become numerators of the softmax; the sum and the output so far are scaled to match.
void soften(State (&s)[1][keys / 8], State (&o)[1][columns / 8], float (&most)[2],
            float (&sum)[2]) {
  for (int half = 0; half < 2; ++half) {
    float top = most[half];
    for (const State& each : s[0])
      for (int e = 0; e < 2; ++e) top = std::fmax(top, each[2 * half + e]);
    for (const int mask : {1, 2}) top = std::fmax(top, shuffle_xor(top, mask));
    const float shrink = exp2(most[half] - top);
    sum[half] *= shrink;
    for (State& each : o[0])
      for (int e = 0; e < 2; ++e) each[2 * half + e] *= shrink;
    for (State& each : s[0])
      for (int e = 0; e < 2; ++e) sum[half] += each[2 * half + e] = exp2(each[2 * half + e] - top);
    most[half] = top;
  }
}

template <class T>
FUSEDATTN_KERNEL void attend_kernel(const FUSEDATTN_GRID_CONSTANT Problem p) {
  const Flaw flaw = p.flaw;
  const int seq_q = int(p.q.shape[0]), seq_k = int(p.k.shape[0]), dim = int(p.q.shape[1]);
  const int first = queries * int(block());
  const int tiles = (seq_k + keys - 1) / keys - (flaw == Flaw::one_tile_less);
  const Part q = {shared_memory()};
  const auto stage = [&](int tile, int which) {
    return Part{q.data + (1 + tile % stages * 2 + which) * Part::bytes};
  };
  const auto copy = [&](int tile) {
    const int end = flaw == Flaw::no_zeros ? tiles * keys : tile < tiles ? seq_k : 0;
    copy_tile<threads>(stage(tile, 0), {p.k.data, p.k.stride[0]}, tile * keys, end, dim);
    copy_tile<threads>(stage(tile, 1), {p.v.data, p.v.stride[0]}, tile * keys, end, dim);
    commit_copies();
  };

  State o[1][columns / 8];
  clear(o);
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  copy_tile<threads>(q, {p.q.data, p.q.stride[0]}, first, seq_q, dim);
  copy(0);
  for (int tile = 0; tile < tiles; ++tile) {
    copy(tile + 1);
    if (flaw == Flaw::wait_for_one_less)
      wait_copies<2>();
    else if (flaw != Flaw::no_wait)
      wait_copies<1>();
    if (flaw != Flaw::no_barrier_after_wait) sync_block();

    State s[1][keys / 8];
    if (flaw == Flaw::no_swizzle)
      scores<T, Straight>(s, q, stage(tile, 0));
    else if (flaw == Flaw::shifted_swizzle)
      scores<T, Shifted>(s, q, stage(tile, 0));
    else
      scores<T, Part>(s, q, stage(tile, 0));
    const int end = seq_k - tile * keys + (flaw == Flaw::one_key_more);
    for (int j = 0; j < keys / 8; ++j)
      for (int e = 0; e < 4; ++e)
        s[0][j][e] = 8 * j + column_of(e) < end ? s[0][j][e] * p.scale * 1.44269504f : -INFINITY;
    soften(s, o, most, sum);
    HeldA<T, 1, keys / 16> weights;
    weights.round(s);
    multiply<T, keys / 16>(o, weights, OperandB<Part, Sum::across>(stage(tile, 1)));
    if (flaw != Flaw::no_barrier_before_copy) sync_block();
  }

  for (int half = 0; half < 2; ++half) {
    for (const int mask : {1, 2}) sum[half] += shuffle_xor(sum[half], mask);
    for (State& each : o[0])
      for (int e = 0; e < 2; ++e) each[2 * half + e] /= sum[half];
  }
  round_to<T>(q, 16 * warp(), o);  // in the place of this warp's queries
  if (flaw != Flaw::no_barrier_before_output) sync_warp();
  write_rows<16>(q, 16 * warp(), p.out.data, p.out.stride[0], first + 16 * warp(), seq_q, dim);
}

void attend(pybind11::handle q, pybind11::handle k, pybind11::handle v, pybind11::handle out,
            float scale, const std::string& flaw) {
  const Problem p = {
      bindings::view(q), bindings::view(k), bindings::view(v), bindings::view(out), scale,
      flaws.at(flaw)};
  const Launch shape = {.grid = (p.q.shape[0] + queries - 1) / queries,
                        .block = threads,
                        .shared_bytes = (1 + 2 * stages) * Part::bytes};
  emulator::checked_call(std::array{p.out}, [&] {
    if (p.q.dtype == DType::f16)
      launch("attend", attend_kernel<f16>, shape, p);
    else
      launch("attend", attend_kernel<bf16>, shape, p);
  });
}

}  // namespace
}  // namespace fusedattn::cuda

namespace fusedattn::emulator {

void bind_tiles(pybind11::module_& m) {
  m.def("attend", &cuda::attend, pybind11::arg("q"), pybind11::arg("k"), pybind11::arg("v"),
        pybind11::arg("out"), pybind11::arg("scale"), pybind11::arg("flaw") = "none",
        "Runs the small attention of the emulator's tests.");
}

}  // namespace fusedattn::emulator
