// Which instruction sets this processor has, and the kernels of the best one.
#pragma once

#include <string>
#include <vector>

#include "attention.h"

namespace fusedattn {

// Names of the instruction sets that are compiled in and usable here, simplest first.
std::vector<std::string> instruction_sets();

// Use kernels of `name` and, for what it does not cover, of simpler sets; "auto" takes the best.
// Throws std::invalid_argument for a name that is not in instruction_sets().
void select_instruction_set(const std::string& name);

void attention_forward(const AttentionForward& params);
void attention_backward(const AttentionBackward& params);

}  // namespace fusedattn
