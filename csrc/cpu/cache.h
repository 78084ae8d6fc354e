// What a call's tensors are measured against: the processor's last level of cache.
#pragma once

#include <cstdint>

namespace fusedattn {

// Bytes that so many threads can count on between them.
int64_t cache_bytes(int threads);

// Whether what lies in the last cache is far: a mesh joins it to Intel's cores.
bool last_cache_is_far();

// Reckon with so many bytes, however many threads; 0 lifts that. For tests.
void assume_cache_bytes(int64_t bytes);

}  // namespace fusedattn
