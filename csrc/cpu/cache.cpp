#include "cache.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedattn {
namespace {

struct Cache {
  int64_t bytes = int64_t{32} << 20;  // where the processor tells of no third level
  int threads = 16;                   // that share it
};

// The last of the "deterministic cache parameters": leaf 4 (Intel SDM, CPUID) or 8000001Dh (AMD APM
// volume 3, E.4.16), which have one layout.
Cache last_cache() {
  Cache last;
#if defined(__x86_64__)
  for (const unsigned leaf : {0x4u, 0x8000001du}) {
    unsigned a, b, c, d;
    for (unsigned index = 0; index < 16; ++index) {
      if (!__get_cpuid_count(leaf, index, &a, &b, &c, &d) || (a & 31) == 0) break;
      if ((a >> 5 & 7) < 3) continue;
      const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 1023) + 1, line = (b & 4095) + 1;
      last = {ways * partitions * line * (int64_t(c) + 1), int(a >> 14 & 4095) + 1};
    }
  }
#endif
  return last;
}

std::atomic<int64_t> assumed{0};

// Intel's last cache serves a whole socket, others' virtual machines too, while CPUID gives it to
// this one alone: of 105 MiB two threads had less than 24.
constexpr int64_t of_a_socket = int64_t{16} << 20;

}  // namespace

int64_t cache_bytes(int threads) {
  if (const int64_t bytes = assumed.load(std::memory_order_relaxed)) return bytes;
  static const Cache cache = last_cache();
  const int caches = threads / cache.threads;
  const int64_t bytes = cache.bytes * (caches > 1 ? caches : 1);
  return last_cache_is_far() ? std::min(bytes, threads * of_a_socket) : bytes;
}

bool last_cache_is_far() {
#if defined(__x86_64__)
  static const bool intel = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
  }();
  return intel;
#else
  return false;
#endif
}

void assume_cache_bytes(int64_t bytes) { assumed = bytes; }

}  // namespace fusedattn
