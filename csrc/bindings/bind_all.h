// Every op's functions of a native module.
#pragma once

#include "bind_attention.h"
#include "bind_norm.h"
#include "bind_rotary.h"
#include "bind_sinusoidal.h"
#include "bind_softmax.h"
#include "bind_swiglu.h"
#include "ops.h"

namespace fusedattn::bindings {

// run(params, stream) serves a call, for the parameters of each op.
template <class Run>
void bind_all(py::module_& m, const Run& run) {
  const auto add = [&]<class... Params>() { (bind<Params>(m, run), ...); };
#define FUSEDATTN_BIND(op, ...) add.template operator()<__VA_ARGS__>();
  FUSEDATTN_OPS(FUSEDATTN_BIND)
#undef FUSEDATTN_BIND
}

}  // namespace fusedattn::bindings
