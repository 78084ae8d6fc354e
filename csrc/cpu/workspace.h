// Scratch memory that outlives a call, so that a training step does not fault in fresh pages.
#pragma once

#include <cstddef>

#include "tensor_view.h"

namespace fusedattn {

// Cuts memory into arrays aligned to 64 bytes; without memory it only counts.
class Arena {
 public:
  FUSEDATTN_MEMBER explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  FUSEDATTN_MEMBER T* take(size_t count) {
    T* result = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return result;
  }

  FUSEDATTN_MEMBER size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The bytes that Scratch(arguments…, arena) takes.
template <class Scratch, class... Arguments>
FUSEDATTN_MEMBER inline size_t bytes_of_scratch(const Arguments&... arguments) {
  Arena counting;
  (void)Scratch(arguments..., counting);
  return counting.used();
}

// At least `shared` bytes for all threads and `own` for each of `threads`, as arenas counted them;
// kept for the next call when released. Throws std::bad_alloc.
//
// Threads' own parts lie a page apart: the hardware fetches past the end of what a core reads, and
// would take from another core what that one is writing.
class Workspace {
 public:
  explicit Workspace(size_t shared, size_t own = 0, size_t threads = 0);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  FUSEDATTN_MEMBER Arena shared() const { return Arena(data_); }
  FUSEDATTN_MEMBER Arena own(size_t thread) const {
    return Arena(data_ + shared_ + thread * stride_);
  }

 private:
  char* data_;
  size_t shared_, stride_;
};

// Whether what is handed out from now on is full of NaN, so that what is read before it is written
// shows. For tests.
void fill_workspace(bool on);

}  // namespace fusedattn
