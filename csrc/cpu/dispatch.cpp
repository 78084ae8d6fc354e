#include "dispatch.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedattn {

#define FUSEDATTN_DECLARE_ROWWISE(isa)    \
  namespace isa {                         \
  NormKernels norm_kernels();             \
  SoftmaxKernels softmax_kernels();       \
  RotaryKernels rotary_kernels();         \
  SinusoidalKernels sinusoidal_kernels(); \
  }
FUSEDATTN_DECLARE_ROWWISE(generic)
FUSEDATTN_DECLARE_ROWWISE(avx2)
FUSEDATTN_DECLARE_ROWWISE(avx512)
FUSEDATTN_DECLARE_ROWWISE(avx512_bf16)

AttentionKernels attention_kernels_generic();
AttentionKernels attention_kernels_avx2();
AttentionKernels attention_kernels_avx512();
AttentionKernels attention_kernels_avx512_bf16();
AttentionKernels attention_kernels_amx();

namespace {

#if FUSEDATTN_HAS_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#if FUSEDATTN_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if FUSEDATTN_HAS_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if FUSEDATTN_HAS_AMX
// The system must also grant the process the use of the tile registers (Linux 5.16).
bool has_amx() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  uint32_t a = 7, b = 0, c = 0, d = 0;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  return has_avx512_bf16() && tile && bf16 &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// All ops of the set `isa`.
#define FUSEDATTN_KERNELS(isa)                                                                     \
  Kernels {                                                                                        \
    attention_kernels_##isa(), isa::norm_kernels(), isa::softmax_kernels(), isa::rotary_kernels(), \
        isa::sinusoidal_kernels()                                                                  \
  }

std::atomic<int> limit{-1};  // index of the best set allowed; -1: all

}  // namespace

const std::vector<InstructionSet>& available_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found = {{"generic", FUSEDATTN_KERNELS(generic)}};
#if FUSEDATTN_HAS_AVX2
    if (has_avx2()) found.push_back({"avx2", FUSEDATTN_KERNELS(avx2)});
#endif
#if FUSEDATTN_HAS_AVX512
    if (has_avx512()) found.push_back({"avx512", FUSEDATTN_KERNELS(avx512)});
#endif
#if FUSEDATTN_HAS_AVX512_BF16
    if (has_avx512_bf16()) found.push_back({"avx512_bf16", FUSEDATTN_KERNELS(avx512_bf16)});
#endif
#if FUSEDATTN_HAS_AMX
    // Tiles multiply; the row-wise ops are those of the set below.
    if (has_amx()) found.push_back({"amx", {attention_kernels_amx(), {}, {}, {}, {}}});
#endif
    return found;
  }();
  return sets;
}

int best_set() {
  const int chosen = limit.load(std::memory_order_relaxed);
  return chosen < 0 ? int(available_sets().size()) - 1 : chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : available_sets()) names.emplace_back(set.name);
  return names;
}

void select_instruction_set(const std::string& name) {
  const auto& sets = available_sets();
  if (name == "auto") {
    limit = -1;
    return;
  }
  for (size_t i = 0; i < sets.size(); ++i) {
    if (name == sets[i].name) {
      limit = int(i);
      return;
    }
  }
  std::string known = "auto";
  for (const auto& set : sets) known += std::string(", ") + set.name;
  throw std::invalid_argument("got instruction set '" + name + "', expected one of " + known);
}

}  // namespace fusedattn
