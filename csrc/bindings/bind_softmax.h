#pragma once

#include "softmax.h"
#include "tensor.h"

namespace fusedattn::bindings {

inline void bind_softmax(py::module_&, void (*)(const SoftmaxForward&, Stream),
                         void (*)(const SoftmaxBackward&, Stream)) {}

}  // namespace fusedattn::bindings
