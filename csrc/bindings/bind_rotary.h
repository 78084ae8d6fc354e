#pragma once

#include "rotary.h"
#include "tensor.h"

namespace fusedattn::bindings {

inline void bind_rotary(py::module_&, void (*)(const Rotary&, Stream)) {}

}  // namespace fusedattn::bindings
