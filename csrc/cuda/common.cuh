// What a CUDA kernel of this library may use. Kernels touch the hardware through these names only:
// device.cuh gives each its meaning on a GPU, emulator/device.h on the host emulator of the tests.
//
//   functions
//     FUSEDATTN_KERNEL void add(float* x, …) { … }                    __global__
//     FUSEDATTN_DEVICE float square(float x) { … }                    called by kernels
//     launch(name, kernel, Launch{…}, arguments…)                     throws std::runtime_error
//   position, in the x dimension only
//     thread() block_size() block() grid_size()
//     lane() warp()                                                   thread() % 32, thread() / 32
//   barriers; memory before them is seen after them
//     sync_block() sync_warp()
//   exchange, by all 32 lanes of a warp
//     shuffle_xor(x, mask) shuffle_down(x, n) shuffle(x, from)
//   global memory
//     load(p) load<N>(p) store(p, x)
//     load_streaming(p) load_streaming<N>(p) store_streaming(p, x)    used once
//     load_integer(view, at)                                          of an int32 or int64 tensor
//     atomic_add(p, x) atomic_max(p, x)                               float; x ≥ 0 for the latter
//     adds_packs() atomic_add(p, pack)                                of four floats at once, where
//                                                                     there is an instruction
//     Workspace(bytes, stream, device)                                for partial results
//   shared memory of the block
//     shared_memory() load_shared(p) load_shared<N>(p) store_shared(p, x)
//   shared memory of the cluster
//     cluster_rank() cluster_size() sync_cluster()
//     remote_shared(p, rank) load_remote(p) store_remote(p, x)
//   conversions
//     to_float(x) from_float<T>(x) widen(pack) narrow<T>(pack)
//   arithmetic, one rounding or the fast instruction
//     exp2 log2 rsqrt sqrt reciprocal fma sincospi
//   for the compiler and the tests
//     anew(x)                            x; what follows from it is computed anew, not kept through
//                                        a loop
//     below(i, end)                      i < end, where an access depends on it
//
// A kernel has no static __shared__ arrays, no recursion and no device-side allocation.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tensor_view.h"
#include "workspace.h"

#ifdef FUSEDATTN_EMULATED
#define FUSEDATTN_KERNEL
#define FUSEDATTN_DEVICE inline __attribute__((always_inline))
#define FUSEDATTN_LAUNCH_BOUNDS(threads, blocks)
#define FUSEDATTN_GRID_CONSTANT
#else
#define FUSEDATTN_KERNEL __global__
#define FUSEDATTN_DEVICE __device__ __forceinline__
// void FUSEDATTN_LAUNCH_BOUNDS(256, 2) name(…): at most so many threads, at least so many blocks
// on a multiprocessor (CUDA guide, "Launch Bounds").
#define FUSEDATTN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// const FUSEDATTN_GRID_CONSTANT Params params: read where it lies, never copied (CUDA guide,
// "__grid_constant__").
#define FUSEDATTN_GRID_CONSTANT __grid_constant__
#endif

namespace fusedattn::cuda {

constexpr int warp_size = 32;

// Where a load or store goes. Streaming: global memory that is used once and need not stay in the
// caches. Remote: the shared memory of any block of the cluster.
enum class Space { global, streaming, shared, remote };

// The two 16-bit formats as bits; they are converted, never computed with.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// N elements that move together: sizes of 2, 4, 8 and 16 bytes in one instruction, larger ones in
// several of 16 bytes. Memory that holds one is aligned to the least of its size and 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static_assert((sizeof(T) * N & (sizeof(T) * N - 1)) == 0, "a power of two");
  T values[N];

  FUSEDATTN_DEVICE T& operator[](int i) { return values[i]; }
  FUSEDATTN_DEVICE const T& operator[](int i) const { return values[i]; }
};

// How many elements make 16 bytes.
template <class T>
constexpr int pack_size = 16 / int(sizeof(T));

struct Launch {
  int64_t grid = 1;      // blocks; a multiple of `cluster`
  int block = 1;         // threads in a block; whole warps
  int shared_bytes = 0;  // dynamic shared memory of a block
  int cluster = 1;       // blocks in a cluster; above 1 on sm_90 and later only
  Stream stream = 0;
  int device = 0;

  std::string text() const {
    return "grid " + std::to_string(grid) + ", block " + std::to_string(block) + ", shared " +
           std::to_string(shared_bytes) + " bytes, cluster " + std::to_string(cluster) +
           ", device " + std::to_string(device);
  }
};

// The blocks of a launch, in the bits that CUDA has for them (CUDA guide, "Technical
// Specifications").
inline unsigned grid_of(const char* kernel, const Launch& shape) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  if (shape.grid <= most) return unsigned(shape.grid);
  throw std::invalid_argument(std::string("fusedattn: ") + kernel + " needs " +
                              std::to_string(shape.grid) + " blocks, a grid has at most " +
                              std::to_string(most) + "; pass the tensors in parts");
}

// visit(dtype, [&](auto element) { using T = decltype(element); … }) for the dtypes of kernels.
template <class Function>
void visit(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f16:
      return function(f16{});
    case DType::bf16:
      return function(bf16{});
    case DType::f32:
      return function(float{});
    default:
      throw std::invalid_argument("fusedattn: CUDA kernels take float16, bfloat16 and float32");
  }
}

// Throws unless kernels take what there is of these.
inline void check_dtypes(std::initializer_list<const TensorView*> views) {
  for (const TensorView* view : views)
    if (*view) visit(view->dtype, [](auto) {});
}

// Whether every row can be read N elements at a time: address and all strides but the last,
// which is 1, are multiples of N elements.
inline bool aligned(const TensorView& view, int dimensions, int n, int element_bytes) {
  if (reinterpret_cast<uintptr_t>(view.data) % (n * element_bytes) != 0) return false;
  if (view.shape[dimensions - 1] != 1 && view.stride[dimensions - 1] != 1) return false;
  for (int i = 0; i < dimensions - 1; ++i)
    if (view.shape[i] != 1 && view.stride[i] % n != 0) return false;
  return true;
}

}  // namespace fusedattn::cuda

#ifdef FUSEDATTN_EMULATED
#include "emulator/device.h"
#else
#include "device.cuh"
#endif

namespace fusedattn::cuda {

// --- memory --------------------------------------------------------------------------------------

// In namespace `machine` stand loads and stores of 1, 2, 4, 8 or 16 bytes; here larger ones are cut
// and a pointer to elements stands for a pointer to a pack of them.

template <Space space, class T>
FUSEDATTN_DEVICE T load_from(const T* from) {
  if constexpr (sizeof(T) <= 16) {
    return machine::load<space>(from);
  } else {
    using Part = Pack<uint32_t, 4>;
    T result;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 16); ++i) {
      const Part part = machine::load<space>(reinterpret_cast<const Part*>(from) + i);
      __builtin_memcpy(reinterpret_cast<char*>(&result) + 16 * i, &part, 16);
    }
    return result;
  }
}

template <Space space, class T>
FUSEDATTN_DEVICE void store_to(T* to, const T& x) {
  if constexpr (sizeof(T) <= 16) {
    machine::store<space>(to, x);
  } else {
    using Part = Pack<uint32_t, 4>;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 16); ++i) {
      Part part;
      __builtin_memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
      machine::store<space>(reinterpret_cast<Part*>(to) + i, part);
    }
  }
}

#define FUSEDATTN_ACCESS(load_name, store_name, space)                        \
  template <class T>                                                          \
  FUSEDATTN_DEVICE T load_name(const T* from) {                               \
    return load_from<space>(from);                                            \
  }                                                                           \
  template <int N, class T>                                                   \
  FUSEDATTN_DEVICE Pack<T, N> load_name(const T* from) {                      \
    return load_from<space>(reinterpret_cast<const Pack<T, N>*>(from));       \
  }                                                                           \
  template <class T>                                                          \
  FUSEDATTN_DEVICE void store_name(T* to, const std::type_identity_t<T>& x) { \
    store_to<space>(to, x);                                                   \
  }                                                                           \
  template <class T, int N>                                                   \
  FUSEDATTN_DEVICE void store_name(T* to, const Pack<T, N>& x) {              \
    store_to<space>(reinterpret_cast<Pack<T, N>*>(to), x);                    \
  }

// Global memory. Streaming: used once, so it need not stay in the caches.
FUSEDATTN_ACCESS(load, store, Space::global)
FUSEDATTN_ACCESS(load_streaming, store_streaming, Space::streaming)
// The block's own shared memory, from shared_memory().
FUSEDATTN_ACCESS(load_shared, store_shared, Space::shared)
// Shared memory of a block of the cluster, from remote_shared().
FUSEDATTN_ACCESS(load_remote, store_remote, Space::remote)
#undef FUSEDATTN_ACCESS

// TensorView::integer
FUSEDATTN_DEVICE int64_t load_integer(const TensorView& view, int64_t at) {
  if (view.dtype == DType::i32) return load(static_cast<const int32_t*>(view.data) + at);
  return load(static_cast<const int64_t*>(view.data) + at);
}

// --- conversions ---------------------------------------------------------------------------------

FUSEDATTN_DEVICE float to_float(float x) { return x; }
FUSEDATTN_DEVICE float to_float(f16 x) { return machine::from_f16(x.bits); }
FUSEDATTN_DEVICE float to_float(bf16 x) { return machine::from_bf16(x.bits); }

// To nearest, ties to even.
template <class T>
FUSEDATTN_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, f16>)
    return {machine::to_f16(x)};
  else if constexpr (std::is_same_v<T, bf16>)
    return {machine::to_bf16(x)};
  else
    return x;
}

template <class T, int N>
FUSEDATTN_DEVICE Pack<float, N> widen(const Pack<T, N>& x) {
  Pack<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = to_float(x[i]);
  return result;
}

// In pairs: one instruction rounds two floats into one register.
template <class T, int N>
FUSEDATTN_DEVICE Pack<T, N> narrow(const Pack<float, N>& x) {
  Pack<T, N> result;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint32_t pair = std::is_same_v<T, f16> ? machine::to_f16_pair(x[i], x[i + 1])
                                                   : machine::to_bf16_pair(x[i], x[i + 1]);
      result[i].bits = uint16_t(pair);
      result[i + 1].bits = uint16_t(pair >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = from_float<T>(x[i]);
  }
  return result;
}

}  // namespace fusedattn::cuda
