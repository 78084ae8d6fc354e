#include "memory.h"

#include <algorithm>
#include <cstring>

namespace fusedattn::emulator {
namespace {

constexpr const char* name_of[] = {"float16", "bfloat16", "float32", "float64",
                                   "bool",    "int32",    "int64"};

using Width = Trace::Width;

// How far apart two threads of the running kernel are.
Width distance(const Moment& a, const Moment& b, int block_size) {
  if (a.cluster != b.cluster) return Width::grid;
  if (a.thread / block_size != b.thread / block_size) return Width::cluster;
  if (a.thread / 32 != b.thread / 32) return Width::block;
  return a.thread != b.thread ? Width::warp : Width::thread;
}

// Whether a barrier stands between what `trace` tells of and `now`.
bool ordered(const Trace& trace, const Moment& now, uint32_t first_cluster, int block_size) {
  const Moment& then = trace.moment;
  if (then.cluster < first_cluster) return true;  // an earlier kernel
  switch (std::max(trace.width, distance(then, now, block_size))) {
    case Width::thread:
      return true;
    case Width::warp:
      if (then.warp_epoch < now.warp_epoch) return true;
      [[fallthrough]];
    case Width::block:
      if (then.block_epoch < now.block_epoch) return true;
      [[fallthrough]];
    case Width::cluster:
      return then.cluster_epoch < now.cluster_epoch;
    case Width::grid:
      return false;
  }
  return false;
}

// Add an access to a trace: it replaces what is ordered before it and joins what is not.
void join(Trace& trace, const Moment& now, Access access, uint32_t first_cluster, int block_size) {
  const Width width = ordered(trace, now, first_cluster, block_size)
                          ? Width::thread
                          : std::max(trace.width, distance(trace.moment, now, block_size));
  trace = {now, width, access == Access::atomic, access == Access::copy};
}

std::string text(const Trace& trace, const char* what, int block_size) {
  return std::string(what) + " by thread " + std::to_string(trace.moment.thread % block_size) +
         (trace.width == Width::grid ? " of another block" : "");
}

bool is_dense(const TensorView& view) {
  int64_t elements = 1, extent = 1;
  for (int i = 0; i < 4; ++i) {
    if (view.shape[i] == 1 || view.stride[i] == 0) continue;
    elements *= view.shape[i];
    extent += (view.shape[i] - 1) * view.stride[i];
  }
  return elements >= extent;
}

// NaN in every element, and nothing in the gaps.
void fill_with_nan(const TensorView& view) {
  const int64_t element = bytes_of(view.dtype);
  const bool is_float = int(view.dtype) < float_dtypes;
  for (int64_t b = 0; b < view.shape[0]; ++b)
    for (int64_t h = 0; h < view.shape[1]; ++h)
      for (int64_t i = 0; i < view.shape[2]; ++i)
        for (int64_t j = 0; j < view.shape[3]; ++j)
          std::memset(static_cast<char*>(view.data) + element * view.offset(b, h, i, j),
                      is_float ? 0xff : 0x7f, size_t(element));
}

}  // namespace

// --- races ---------------------------------------------------------------------------------------

void Shadow::split(Line& line) {
  if (free_.empty()) {
    line.parts = int(parts_.size());
    parts_.resize(parts_.size() + size_t(per_line_));
  } else {
    line.parts = free_.back();
    free_.pop_back();
  }
  std::fill_n(parts_.begin() + line.parts, per_line_, line.whole);
}

// After a store to all of it, which is ordered after whatever came before: of loads that came
// before it, it will tell as well.
void Shadow::unite(Line& line) {
  line.whole = {Trace(), parts_[size_t(line.parts)].store};
  free_.push_back(line.parts);
  line.parts = -1;
}

bool Shadow::written(int64_t offset) const {
  const Line& line = lines_[size_t(offset / line_bytes)];
  const Cell& cell =
      line.parts < 0 ? line.whole : parts_[size_t(line.parts + offset % line_bytes / granule_)];
  return cell.store.moment.cluster != 0;
}

std::string Shadow::visit(Cell& cell, Access access, const Moment& now, uint32_t first_cluster,
                          int block_size) {
  const auto before = [&](const Trace& trace) {
    return ordered(trace, now, first_cluster, block_size);
  };
  if (cell.store.in_flight && access != Access::landing)
    return text(cell.store, "a copy that no wait_copies() has landed", block_size);
  const bool both_atomic = access == Access::atomic && cell.store.atomic;
  if (!both_atomic && !before(cell.store)) return text(cell.store, "a store", block_size);
  if (access != Access::load && !before(cell.load)) return text(cell.load, "a load", block_size);
  Trace& trace = access == Access::load ? cell.load : cell.store;
  join(trace, now, access, first_cluster, block_size);
  return "";
}

std::string Shadow::note(int64_t offset, int bytes, Access access, const Moment& now,
                         uint32_t first_cluster, int block_size) {
  const int64_t end = offset + bytes;
  for (int64_t at = offset; at < end;) {
    Line& line = lines_[size_t(at / line_bytes)];
    const int64_t line_end = (at / line_bytes + 1) * line_bytes, until = std::min(end, line_end);
    const bool whole = at % line_bytes == 0 && until == line_end;
    if (line.parts < 0 && !whole) split(line);
    const bool parts = line.parts >= 0;
    Cell* cells = parts ? &parts_[size_t(line.parts)] : &line.whole;
    const int first = parts ? int(at % line_bytes) / granule_ : 0;
    const int last = parts ? int((until - 1) % line_bytes) / granule_ : 0;
    for (int i = first; i <= last; ++i) {
      std::string race = visit(cells[i], access, now, first_cluster, block_size);
      if (!race.empty()) return race;
    }
    if (parts && whole && access != Access::load && access != Access::atomic) unite(line);
    at = until;
  }
  return "";
}

// --- tensors -------------------------------------------------------------------------------------

bool Allocation::holds(int64_t offset, int bytes) const {
  if (offset < 0 || offset + bytes > end - begin) return false;
  if (dense) return true;
  for (int64_t at = offset / element; at <= (offset + bytes - 1) / element; ++at) {
    int64_t rest = at;
    for (int i = 0; i < 4; ++i)  // largest stride first
      if (stride[i] > 0) rest -= stride[i] * std::min(rest / stride[i], shape[i] - 1);
    if (rest != 0) return false;
  }
  return true;
}

Memory& Memory::here() {
  static thread_local Memory memory;
  return memory;
}

void Memory::add_tensor(const TensorView& view) {
  Allocation added = {};
  added.begin = static_cast<char*>(view.data);
  added.element = bytes_of(view.dtype);
  added.dense = is_dense(view);
  int order[4] = {0, 1, 2, 3};
  std::stable_sort(order, order + 4, [&](int a, int b) { return view.stride[a] > view.stride[b]; });
  int64_t extent = 1;
  std::string shape;
  for (int i = 0; i < 4; ++i) {
    extent += (view.shape[i] - 1) * view.stride[i];
    added.shape[i] = view.shape[order[i]];
    added.stride[i] = added.shape[i] == 1 ? 0 : view.stride[order[i]];
    shape += (i ? ", " : "") + std::to_string(view.shape[i]);
  }
  added.end = added.begin + extent * added.element;
  added.views = 1;
  if (allocations_.empty()) tensors_ = 0;
  for (Allocation& each : allocations_) {
    if (each.begin != added.begin || !std::equal(each.shape, each.shape + 4, added.shape) ||
        !std::equal(each.stride, each.stride + 4, added.stride))
      continue;
    ++each.views;
    ++tensors_;
    return;
  }
  added.name =
      "tensor " + std::to_string(tensors_++) + " (" + shape + ") " + name_of[int(view.dtype)];
  allocations_.push_back(std::move(added));
}

void Memory::mark_output(const TensorView& view) {
  for (Allocation& each : allocations_) {
    if (each.begin != view.data) continue;
    each.output = outputs_known_ = true;
    if (each.views == 1) fill_with_nan(view);
  }
}

void Memory::add_workspace(void* data, int64_t bytes) {
  Allocation added = {};
  added.begin = static_cast<char*>(data);
  added.end = added.begin + bytes;
  added.element = 1;
  added.dense = added.workspace = true;
  added.shadow = Shadow(bytes, 2);
  added.name = "workspace of " + std::to_string(bytes) + " bytes";
  std::memset(data, 0xff, size_t(bytes));
  allocations_.push_back(std::move(added));
}

void Memory::remove_workspace(void* data) {
  std::erase_if(allocations_, [data](const Allocation& each) { return each.begin == data; });
}

Allocation* Memory::find(const char* at, int bytes, bool to_write) {
  // A view of an output may also stand among the inputs: what is written there counts.
  Allocation* found = nullptr;
  for (Allocation& each : allocations_)
    if (each.holds(at - each.begin, bytes) && (!found || !each.shadow.empty() || each.output))
      found = &each;
  if (to_write && found && found->shadow.empty())
    found->shadow = Shadow(found->end - found->begin, found->element);
  return found;
}

std::string Memory::nearest(const char* at) const {
  const auto distance = [at](const Allocation& each) {
    return at < each.begin ? each.begin - at : at < each.end ? 0 : at - each.end;
  };
  const auto best = std::min_element(
      allocations_.begin(), allocations_.end(),
      [&](const Allocation& a, const Allocation& b) { return distance(a) < distance(b); });
  if (best == allocations_.end()) return "there are no tensors";
  const std::string name = best->name;
  if (at < best->begin) return std::to_string(best->begin - at) + " bytes before " + name;
  if (at < best->end)
    return std::to_string(at - best->begin) + " bytes into " + name + ", in a gap or at its end";
  return std::to_string(at - best->end) + " bytes past the end of " + name;
}

std::string Memory::note(const void* at, int bytes, Access access, const Moment& now,
                         uint32_t first_cluster, int block_size) {
  const char* address = static_cast<const char*>(at);
  Allocation* place = find(address, bytes, access != Access::load);
  if (!place) return "outside every tensor: " + nearest(address);
  if (access != Access::load && outputs_known_ && !place->output && !place->workspace)
    return "an input: " + place->name;
  if (place->shadow.empty()) return "";
  const std::string other =
      place->shadow.note(address - place->begin, bytes, access, now, first_cluster, block_size);
  return other.empty() ? "" : "a race in " + place->name + " with " + other;
}

std::string Memory::unwritten() const {
  for (const Allocation& each : allocations_) {
    // In place, an element that is not written keeps its value.
    if (!each.output || each.views > 1) continue;
    for (int64_t offset = 0; offset < each.end - each.begin; offset += each.element) {
      if (!each.holds(offset, each.element)) continue;
      if (each.shadow.empty() || !each.shadow.written(offset))
        return "element " + std::to_string(offset / each.element) + " of " + each.name;
    }
  }
  return "";
}

}  // namespace fusedattn::emulator
