#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>

namespace fusedattn {
namespace {

constexpr size_t page = 4096;
constexpr size_t kept_at_most = size_t{48} << 20;

std::mutex guard;
char* kept = nullptr;
size_t kept_bytes = 0;

}  // namespace

Workspace::Workspace(size_t shared, size_t own, size_t threads)
    : data_(nullptr), shared_(shared + page), stride_(own + page) {
  const size_t bytes = shared_ + stride_ * threads;
  bytes_ = bytes;
  char* too_small = nullptr;
  {
    const std::lock_guard<std::mutex> lock(guard);
    if (kept_bytes >= bytes) {
      data_ = kept;
      bytes_ = kept_bytes;
    } else {
      too_small = kept;
    }
    kept = nullptr;
    kept_bytes = 0;
  }
  std::free(too_small);
  if (data_ == nullptr) {
    // 2 MiB alignment lets the kernel back it with huge pages.
    constexpr size_t huge = size_t{2} << 20;
    const size_t alignment = bytes_ >= huge ? huge : 64;
    bytes_ = (bytes_ + alignment - 1) / alignment * alignment;
    data_ = static_cast<char*>(std::aligned_alloc(alignment, bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
  }
}

Workspace::~Workspace() {
  char* unused = data_;
  {
    const std::lock_guard<std::mutex> lock(guard);
    if (bytes_ > kept_bytes && bytes_ <= kept_at_most) {
      unused = kept;
      kept = data_;
      kept_bytes = bytes_;
    }
  }
  std::free(unused);
}

}  // namespace fusedattn
