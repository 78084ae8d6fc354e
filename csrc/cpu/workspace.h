// Scratch memory that outlives a call, so that a training step does not fault in fresh pages.
#pragma once

#include <cstddef>

#include "tensor_view.h"

namespace fusedattn {

// At least `bytes`, aligned to 64; kept for the next call when released. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  FUSEDATTN_MEMBER char* data() const { return data_; }

 private:
  char* data_;
  size_t bytes_;
};

// Cuts a workspace into arrays; without memory it only counts.
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

}  // namespace fusedattn
