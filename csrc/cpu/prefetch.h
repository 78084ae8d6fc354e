// Ahead of the caches, and past them: lines asked for before they are needed, stores that leave no
// line behind.
#pragma once

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

// Asks for a line that is read once, so that it pushes out nothing that is read again.
FUSEDATTN_INLINE void prefetch_once(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchnta (%0)" : : "r"(p));  // the builtin's would be dropped from some loops
#else
  __builtin_prefetch(p, 0, 0);
#endif
}

// Asks for a line that is soon read.
FUSEDATTN_INLINE void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 (%0)" : : "r"(p));
#else
  __builtin_prefetch(p);
#endif
}

// Asks for a line that is soon overwritten.
FUSEDATTN_INLINE void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw (%0)" : : "r"(p));
#else
  __builtin_prefetch(p, 1);
#endif
}

// Writes x past the caches where the set can; p is aligned to x. `drain` orders such stores before
// whatever tells another thread of them.
template <class V>
FUSEDATTN_INLINE void stream(void* p, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#endif
  memcpy(p, &x, sizeof(V));
}

FUSEDATTN_INLINE void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fusedattn::FUSEDATTN_ISA
