// The names of common.cuh on a GPU. "PTX" is the PTX ISA manual, "guide" the CUDA C++ programming
// guide; what stands after it is the section.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace fusedattn::cuda {

// --- position (PTX: Special Registers) -----------------------------------------------------------

FUSEDATTN_DEVICE int thread() { return int(threadIdx.x); }
FUSEDATTN_DEVICE int block_size() { return int(blockDim.x); }
// Wide, so that a row number computed from it does not overflow.
FUSEDATTN_DEVICE int64_t block() { return int64_t(blockIdx.x); }
FUSEDATTN_DEVICE int64_t grid_size() { return int64_t(gridDim.x); }
// Unsigned, so that what divides them further knows that they are not negative.
FUSEDATTN_DEVICE int lane() { return int(threadIdx.x % unsigned(warp_size)); }
FUSEDATTN_DEVICE int warp() { return int(threadIdx.x / unsigned(warp_size)); }

// asm volatile is neither hoisted out of a loop nor merged with another.
FUSEDATTN_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A macro: as a function it costs kernels of wide rows up to 16 registers (nvcc 13.0).
#define below(i, end) ((i) < (end))

// --- barriers and shuffles -----------------------------------------------------------------------

// PTX: bar.sync; guide: Synchronization Functions.
FUSEDATTN_DEVICE void sync_block() { __syncthreads(); }

// PTX: bar.warp.sync.
FUSEDATTN_DEVICE void sync_warp() { __syncwarp(); }

// PTX: shfl.sync, modes bfly, down and idx; guide: Warp Shuffle Functions. Types of 4 or 8 bytes.
template <class T>
FUSEDATTN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// The last n lanes get their own value back.
template <class T>
FUSEDATTN_DEVICE T shuffle_down(T x, int n) {
  return __shfl_down_sync(0xffffffffu, x, n);
}

template <class T>
FUSEDATTN_DEVICE T shuffle(T x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}

// --- shared memory and clusters ------------------------------------------------------------------

// Guide: __shared__, "dynamically allocated".
FUSEDATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char fusedattn_shared[];
  return fusedattn_shared;
}

// PTX: %cluster_ctarank, %cluster_nctarank; 0 and 1 before sm_90.
FUSEDATTN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

FUSEDATTN_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}

// PTX: barrier.cluster.arrive (release) and barrier.cluster.wait (acquire). A barrier of the block
// before sm_90.
FUSEDATTN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// PTX: mapa. `at` in the block's own shared memory; the same place in that of block `rank`, for
// load_remote and store_remote. That block must not have ended: sync_cluster() before it does.
template <class T>
FUSEDATTN_DEVICE T* remote_shared(T* at, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(uint64_t(at)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return at;
#endif
}

// --- loads, stores, conversions ------------------------------------------------------------------

namespace machine {

template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// PTX: ld.global (128 bits: ld.global.v4.b32), ld.global.cs, ld.shared; a remote address is
// generic. What the compiler is told of the address space makes it choose (guide: Address Space
// Predicate Functions).
template <Space space, class T>
FUSEDATTN_DEVICE T load(const T* from) {
  using W = typename Word<sizeof(T)>::type;
  const W* at = reinterpret_cast<const W*>(from);
  W word;
  if constexpr (space == Space::streaming) {
    word = __ldcs(at);
  } else {
    if constexpr (space == Space::global) __builtin_assume(__isGlobal(at));
    if constexpr (space == Space::shared) __builtin_assume(__isShared(at));
    word = *at;
  }
  T result;
  __builtin_memcpy(&result, &word, sizeof(T));
  return result;
}

// PTX: st.global (128 bits: st.global.v4.b32), st.global.cs, st.shared.
template <Space space, class T>
FUSEDATTN_DEVICE void store(T* to, const T& x) {
  using W = typename Word<sizeof(T)>::type;
  W* at = reinterpret_cast<W*>(to);
  W word;
  __builtin_memcpy(&word, &x, sizeof(T));
  if constexpr (space == Space::streaming) {
    __stcs(at, word);
  } else if constexpr (space == Space::global) {
    __builtin_assume(__isGlobal(at));
    // Assigned through a pointer, 16 bytes may be taken apart and stored in pieces.
    if constexpr (sizeof(T) == 16)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)),
                   "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                   : "memory");
    else
      *at = word;
  } else {
    if constexpr (space == Space::shared) __builtin_assume(__isShared(at));
    *at = word;
  }
}

// PTX: cvt.
FUSEDATTN_DEVICE float from_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FUSEDATTN_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
FUSEDATTN_DEVICE uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
FUSEDATTN_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// PTX: cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32; `low` in the low half.
FUSEDATTN_DEVICE uint32_t to_f16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FUSEDATTN_DEVICE uint32_t to_bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace machine

// PTX: red.global.add.f32; guide: Atomic Functions.
FUSEDATTN_DEVICE void atomic_add(float* to, float x) { atomicAdd(to, x); }

// PTX: red.global.add.v4.f32, on sm_90 and later.
FUSEDATTN_DEVICE bool adds_packs() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

FUSEDATTN_DEVICE void atomic_add(float* to, const Pack<float, 4>& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(to)),
               "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, x[i]);
#endif
}

// PTX: red.global.max.s32: as integers, numbers that are not negative have the same order.
FUSEDATTN_DEVICE void atomic_max(float* to, float x) {
  atomicMax(reinterpret_cast<int*>(to), __float_as_int(x));
}

// --- arithmetic ----------------------------------------------------------------------------------

// PTX: ex2.approx.ftz.f32, 2 ulp.
FUSEDATTN_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// PTX: lg2.approx.ftz.f32.
FUSEDATTN_DEVICE float log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// PTX: rsqrt.approx.f32, 2 ulp.
FUSEDATTN_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
// PTX: sqrt.rn.f32, rcp.rn.f32, fma.rn.f32: correctly rounded.
FUSEDATTN_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
FUSEDATTN_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
FUSEDATTN_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// sin(πx) and cos(πx), 1 ulp (guide: Mathematical Functions).
FUSEDATTN_DEVICE void sincospi(float x, float* sine, float* cosine) {
  ::sincospif(x, sine, cosine);
}

// --- the host's side -----------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* what, const std::string& where, cudaError_t error) {
  throw std::runtime_error(std::string("fusedattn: ") + what + " (" + where + ") failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline void check(cudaError_t error, const char* what, const std::string& where = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a later call must not report it again
  fail(what, where, error);
}

// Work on a GPU, then return to the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice", std::to_string(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, what, device), "cudaDeviceGetAttribute");
  return value;
}

// What launchers ask of a device, which never changes: asked for once.
struct Device {
  int multiprocessors;
  int capability;        // 10 · major + minor
  int max_shared_bytes;  // dynamic, that a block may ask for
  int cache_bytes;       // of the second level
};

inline const Device& properties(int device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const Device asked = {attribute(cudaDevAttrMultiProcessorCount, device),
                        10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                            attribute(cudaDevAttrComputeCapabilityMinor, device),
                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                        attribute(cudaDevAttrL2CacheSize, device)};
  return known.emplace(device, asked).first->second;
}

inline int multiprocessors(int device) { return properties(device).multiprocessors; }
inline int capability(int device) { return properties(device).capability; }
inline int max_shared_bytes(int device) { return properties(device).max_shared_bytes; }
inline int cache_bytes(int device) { return properties(device).cache_bytes; }

// Blocks of a kernel that fit on one multiprocessor at a time (guide: Occupancy Calculator).
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), const Launch& launch) {
  const DeviceGuard guard(launch.device);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, launch.block,
                                                      size_t(launch.shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

// Guide: Execution Configuration; Thread Block Clusters.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid_of(name, shape));
  const DeviceGuard guard(shape.device);
  if (shape.shared_bytes > 48 * 1024)  // more has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shape.shared_bytes),
          name, shape.text());
  if (shape.cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name,
          shape.text());
  config.blockDim = dim3(unsigned(shape.block));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) check(error, name, shape.text());
  check(cudaGetLastError(), name, shape.text());
}

// Zeros, before kernels that add.
inline void set_zero(void* at, int64_t bytes, Stream stream, int device) {
  const DeviceGuard guard(device);
  check(cudaMemsetAsync(at, 0, size_t(bytes), reinterpret_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync", std::to_string(bytes) + " bytes on device " + std::to_string(device));
}

}  // namespace fusedattn::cuda
