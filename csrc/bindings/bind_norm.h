#pragma once

#include "norm.h"
#include "tensor.h"

namespace fusedattn::bindings {

inline void bind_norm(py::module_&, void (*)(const NormForward&, Stream),
                      void (*)(const NormBackward&, Stream)) {}

}  // namespace fusedattn::bindings
