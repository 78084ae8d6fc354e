#pragma once

#include "sinusoidal.h"
#include "tensor.h"

namespace fusedattn::bindings {

inline void bind_sinusoidal(py::module_&, void (*)(const Sinusoidal&, Stream)) {}

}  // namespace fusedattn::bindings
