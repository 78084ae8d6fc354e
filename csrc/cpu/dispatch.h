// Which instruction sets this processor has, and the kernels of the best one.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace fusedattn {

// What one instruction set serves; what it leaves empty, a simpler one does.
template <class, class... Params>
using TableOf = KernelTable<Params...>;
#define FUSEDATTN_PARAMS(op, ...) , __VA_ARGS__
using Kernels = TableOf<void FUSEDATTN_CPU_OPS(FUSEDATTN_PARAMS)>;
#undef FUSEDATTN_PARAMS

struct InstructionSet {
  const char* name;
  Kernels kernels;
};

// The sets that are compiled in and usable on this processor, simplest first.
const std::vector<InstructionSet>& available_sets();

// Index of the best set in use.
int best_set();

std::vector<std::string> instruction_sets();

// Use kernels of `name` and, for what it does not cover, of simpler sets; "auto" takes the best.
// Throws std::invalid_argument for a name that is not in instruction_sets().
void select_instruction_set(const std::string& name);

// Runs the kernel of the best set in use that takes the call.
template <class Params>
void run(const Params& params) {
  const auto& sets = available_sets();
  for (int i = best_set(); i >= 0; --i) {
    const Kernel<Params>& kernel = sets[i].kernels.of(params);
    if (kernel.run == nullptr || params.work() < kernel.least_work) continue;
    if (kernel.run(params)) return;
  }
  throw std::logic_error("no kernel for this dtype");
}

}  // namespace fusedattn
