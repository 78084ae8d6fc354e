// What kernels under the emulator may touch: the tensors of the call, workspaces and the shared
// memory of blocks; and who touched it last, so that two threads that race are seen.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace fusedattn::emulator {

// A copy is the beginning of an asynchronous one: until its landing, what the place holds is
// undefined, so that no thread may touch it.
enum class Access : uint8_t { load, store, atomic, copy, landing };

// A moment in the life of a thread. Everything up to a barrier is ordered before everything after
// it, for the threads that meet there.
struct Moment {
  uint32_t cluster = 0;  // serial number of all clusters ever run; 0 before the first
  uint32_t cluster_epoch = 0, block_epoch = 0, warp_epoch = 0;  // barriers passed
  uint16_t thread = 0;                                          // within the cluster
};

// The last accesses of one kind to one place: several threads', if they are not ordered.
struct Trace {
  enum class Width : uint8_t { thread, warp, block, cluster, grid };

  Moment moment;
  Width width = Width::thread;  // how far apart the threads are
  bool atomic = false;
  bool in_flight = false;
};

// The history of a range of memory in granules of a few bytes. Lines of 16 bytes whose granules
// have the same one have it once: most accesses are of whole lines.
class Shadow {
 public:
  Shadow() = default;
  Shadow(int64_t bytes, int granule)
      : granule_(granule), per_line_(line_bytes / granule), lines_(bytes / line_bytes + 1) {}

  bool empty() const { return lines_.empty(); }
  bool written(int64_t offset) const;

  // Note an access; "" or with whom it races. Clusters from `first_cluster` on are those of the
  // running kernel; `block_size` is its number of threads in a block.
  std::string note(int64_t offset, int bytes, Access access, const Moment& now,
                   uint32_t first_cluster, int block_size);

 private:
  static constexpr int line_bytes = 16;
  struct Cell {
    Trace load, store;
  };
  struct Line {
    Cell whole;
    int parts = -1;  // where in parts_ its granules are, if they differ
  };

  std::string visit(Cell& cell, Access access, const Moment& now, uint32_t first_cluster,
                    int block_size);
  void split(Line& line);
  void unite(Line& line);

  int granule_ = 1, per_line_ = line_bytes;
  std::vector<Line> lines_;
  std::vector<Cell> parts_;
  std::vector<int> free_;  // in parts_
};

// A tensor of the call, or a workspace.
struct Allocation {
  char* begin;
  char* end;
  int element;  // bytes
  int64_t shape[4];
  int64_t stride[4];
  bool dense;      // no gaps between elements
  bool output;     // every element has to be written
  bool workspace;  // of the kernels' own
  int views;       // arguments that are this tensor
  Shadow shadow;
  std::string name;

  // Whether bytes [offset, offset + bytes) are elements, none of them in a gap.
  bool holds(int64_t offset, int bytes) const;
};

class Memory {
 public:
  // That of the running thread of the host.
  static Memory& here();

  void add_tensor(const TensorView& view);
  // Kernels write every element of this one, and may write no tensor that is not marked. It is
  // filled with NaN, unless it shares its memory with an input.
  void mark_output(const TensorView& view);
  void add_workspace(void* data, int64_t bytes);
  void remove_workspace(void* data);
  void clear() { allocations_.clear(), outputs_known_ = false; }

  // Note an access of global memory; "" or what is wrong with it.
  std::string note(const void* at, int bytes, Access access, const Moment& now,
                   uint32_t first_cluster, int block_size);

  // "" or which element of an output no kernel has written.
  std::string unwritten() const;

 private:
  Allocation* find(const char* at, int bytes, bool to_write);
  std::string nearest(const char* at) const;

  std::deque<Allocation> allocations_;
  int tensors_ = 0;
  bool outputs_known_ = false;
};

}  // namespace fusedattn::emulator
