// The threads of a kernel.
#pragma once

#include <omp.h>

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

// All, or one: for work that is over before the others wake, and where somebody else's team is.
FUSEDATTN_INLINE int threads_if(bool worth_waking) {
  return worth_waking && !omp_in_parallel() ? omp_get_max_threads() : 1;
}

// Runs body() on each of so many threads. One needs no team, which costs libgomp a system call to
// end; but inside somebody else's, body() must not meet the barriers of that one.
template <class Body>
static void on_threads(int threads, const Body& body) {
  if (threads == 1 && !omp_in_parallel()) return body();
#pragma omp parallel num_threads(threads)
  body();
}

}  // namespace fusedattn::FUSEDATTN_ISA
