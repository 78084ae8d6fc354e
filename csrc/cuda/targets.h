// What the kernels were compiled for: setup.py defines FUSEDATTN_CUDA_TARGETS, "80,90a".
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

namespace fusedattn::cuda {

struct Target {
  int capability;
  char kind;  // 'a': this GPU alone; 'f': this GPU and later ones of its family; 0: see below
};

inline const std::vector<Target>& targets() {
  static const std::vector<Target> all = [] {
    std::vector<Target> found;
    for (const char* at = FUSEDATTN_CUDA_TARGETS; *at != 0;) {
      char* end;
      const int capability = int(std::strtol(at, &end, 10));
      const bool named = *end == 'a' || *end == 'f';
      found.push_back({capability, named ? *end : char(0)});
      at = end + named;
      if (*at == ',') ++at;
    }
    return found;
  }();
  return all;
}

inline std::vector<int> architectures() {
  std::vector<int> result;
  for (const Target& each : targets()) result.push_back(each.capability);
  return result;
}

// Machine code runs on later GPUs of the same major version; the last target comes as PTX too,
// which the driver compiles for any later GPU (CUDA guide, "Application Compatibility").
inline bool runs_on(int capability) {
  const auto runs = [capability](const Target& target) {
    if (target.kind == 'a') return capability == target.capability;
    return capability / 10 == target.capability / 10 && capability >= target.capability;
  };
  const Target& last = targets().back();
  return std::any_of(targets().begin(), targets().end(), runs) ||
         (last.kind == 0 && capability >= last.capability);
}

}  // namespace fusedattn::cuda
