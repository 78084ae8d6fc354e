// The ops. What every op has in each module is made from this list.
#pragma once

#include "attention.h"
#include "norm.h"
#include "rotary.h"
#include "sinusoidal.h"
#include "softmax.h"
#include "swiglu.h"

// ROW(op, forward parameters[, backward parameters]); op is the stem of its files.
#define FUSEDATTN_OPS(ROW)                            \
  ROW(attention, AttentionForward, AttentionBackward) \
  ROW(norm, NormForward, NormBackward)                \
  ROW(softmax, SoftmaxForward, SoftmaxBackward)       \
  ROW(rotary, Rotary)                                 \
  ROW(sinusoidal, Sinusoidal)                         \
  ROW(swiglu, SwigluForward, SwigluBackward)

// With those that the CPU alone has.
#define FUSEDATTN_CPU_OPS(ROW) \
  FUSEDATTN_OPS(ROW)           \
  ROW(attention_jvp, AttentionJvp)
