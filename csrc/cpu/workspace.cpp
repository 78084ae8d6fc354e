#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fusedattn {
namespace {

constexpr size_t page = 4096;
constexpr size_t kept_at_most = size_t{48} << 20;

// What stands before the memory itself, whose bytes it counts.
struct alignas(64) Header {
  size_t bytes;
};

// Taken and given back by an exchange of pointers: a lock that some thread holds when the process
// forks would never open in the child.
std::atomic<Header*> kept{nullptr};
std::atomic<bool> filled{false};

Header* allocate(size_t bytes) {
  // 2 MiB alignment lets the kernel back it with huge pages.
  constexpr size_t huge = size_t{2} << 20;
  const size_t needed = sizeof(Header) + bytes, alignment = needed >= huge ? huge : 64;
  const size_t rounded = (needed + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return new (memory) Header{rounded - sizeof(Header)};
}

}  // namespace

Workspace::Workspace(size_t shared, size_t own, size_t threads)
    : shared_(shared + page), stride_(own + page) {
  const size_t bytes = shared_ + stride_ * threads;
  Header* block = kept.exchange(nullptr);
  if (block == nullptr || block->bytes < bytes) {
    std::free(block);
    block = allocate(bytes);
  }
  data_ = reinterpret_cast<char*>(block + 1);
  if (filled.load(std::memory_order_relaxed)) std::memset(data_, 0xff, bytes);
}

Workspace::~Workspace() {
  Header* const block = reinterpret_cast<Header*>(data_) - 1;
  Header* unused = block;
  if (block->bytes <= kept_at_most) {
    unused = kept.exchange(block);
    // The larger one stays.
    if (unused != nullptr && unused->bytes > block->bytes) unused = kept.exchange(unused);
  }
  std::free(unused);
}

void fill_workspace(bool on) { filled = on; }

}  // namespace fusedattn
