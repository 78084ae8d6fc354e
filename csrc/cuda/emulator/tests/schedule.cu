// attention_schedule.h for Python, one call at a time.
#include "cuda/attention_schedule.h"

#include <pybind11/pybind11.h>

#include <tuple>

namespace fusedattn::emulator {
namespace {

using Four = std::tuple<int, int, int, int>;

Sequence<int> sequence(int64_t seq_q, int64_t seq_k, int causal, int64_t keys, int64_t left,
                       int64_t right) {
  AttentionForward p;
  p.q.shape[2] = seq_q;
  p.k.shape[2] = seq_k;
  p.options.causal = Causal(causal);
  p.options.window_left = left;
  p.options.window_right = right;
  return p.with_keys(int(keys));
}

Four tuple(const cuda::Tiles& x) { return {x.begin, x.full_begin, x.full_end, x.end}; }

}  // namespace

void bind_schedule(pybind11::module_& m) {
  m.def("key_tiles", [](int64_t seq_q, int64_t seq_k, int causal, int64_t keys, int64_t first,
                        int rows, int width, int64_t left, int64_t right) {
    const Sequence<int> all = sequence(seq_q, seq_k, causal, keys, left, right);
    return tuple(cuda::key_tiles(all, first, rows, width));
  });
  m.def("query_tiles", [](int64_t seq_q, int64_t seq_k, int causal, int64_t keys, int64_t first,
                          int rows, int width, int64_t left, int64_t right) {
    const Sequence<int> all = sequence(seq_q, seq_k, causal, keys, left, right);
    return tuple(cuda::query_tiles(all, first, rows, width));
  });
  m.def("work_of", [](uint32_t block, uint32_t tiles, uint32_t heads, uint32_t section) {
    const cuda::Work work = cuda::work_of(block, tiles, heads, section);
    return std::tuple(work.tile, work.head);
  });
  m.def("section_of", &cuda::section_of);
  m.def("parts_of", &cuda::parts_of);
  m.def("part_of", [](int first, int past, int part, int parts) {
    const cuda::Part found = cuda::part_of(first, past, part, parts);
    return std::pair(found.begin, found.end);
  });
}

}  // namespace fusedattn::emulator
