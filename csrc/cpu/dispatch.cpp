#include "dispatch.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedattn {

// <isa>::<op>_kernels(), of each op.
#define FUSEDATTN_DECLARE(op, ...) KernelTable<__VA_ARGS__> op##_kernels();
namespace generic {
FUSEDATTN_CPU_OPS(FUSEDATTN_DECLARE)
}
namespace avx2 {
FUSEDATTN_CPU_OPS(FUSEDATTN_DECLARE)
}
namespace avx512 {
FUSEDATTN_CPU_OPS(FUSEDATTN_DECLARE)
}
namespace avx512_bf16 {
FUSEDATTN_CPU_OPS(FUSEDATTN_DECLARE)
}
namespace amx {  // tiles multiply; the row-wise ops are those of the set below
KernelTable<AttentionForward, AttentionBackward> attention_kernels();
KernelTable<AttentionJvp> attention_jvp_kernels();
}  // namespace amx
#undef FUSEDATTN_DECLARE

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

template <class... Params>
void take(Kernels& all, const KernelTable<Params...>& of_op) {
  ((static_cast<Table<Params>&>(all) = of_op), ...);
}

// Adds the kernels of an op, by name `op` in namespace `isa`.
#define FUSEDATTN_TAKE(op, ...) take(set.kernels, op##_kernels());
#define FUSEDATTN_SET(isa)            \
  [] {                                \
    using namespace isa;              \
    InstructionSet set = {#isa, {}};  \
    FUSEDATTN_CPU_OPS(FUSEDATTN_TAKE) \
    return set;                       \
  }()

std::atomic<int> limit{-1};  // index of the best set allowed; -1: all

}  // namespace

const std::vector<InstructionSet>& available_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found = {FUSEDATTN_SET(generic)};
#if FUSEDATTN_HAS_AVX2
    if (has_avx2()) found.push_back(FUSEDATTN_SET(avx2));
#endif
#if FUSEDATTN_HAS_AVX512
    if (has_avx512()) found.push_back(FUSEDATTN_SET(avx512));
#endif
#if FUSEDATTN_HAS_AVX512_BF16
    if (has_avx512_bf16()) found.push_back(FUSEDATTN_SET(avx512_bf16));
#endif
#if FUSEDATTN_HAS_AMX
    if (has_amx()) {
      found.push_back({"amx", {}});
      take(found.back().kernels, amx::attention_kernels());
      take(found.back().kernels, amx::attention_jvp_kernels());
    }
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
