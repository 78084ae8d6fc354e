// What the kernels of whole rows share: rows of any dtype, a row split over a team of threads, and
// the team's reductions. A row is cut into chunks of N elements; thread r of a team of S takes the
// chunks r, r + S, r + 2S, … so that neighbours read neighbouring memory.
#pragma once

#include "common.cuh"

namespace fusedattn::cuda {

// --- elements ------------------------------------------------------------------------------------

// In place of an element type: the dtype is known at run time only.
struct Any {};

// What a thread keeps of an element of type T.
template <class T>
using Held = std::conditional_t<std::is_same_v<T, Any>, float, T>;

// A matrix with unit column stride, or a vector.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;  // from row to row, in elements
  DType dtype = DType::f32;

  FUSEDATTN_DEVICE bool there() const { return data != nullptr; }
};

inline Matrix matrix(const TensorView& view) { return {view.data, view.stride[0], view.dtype}; }

inline int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return 1;
    case DType::f16:
    case DType::bf16:
      return 2;
    default:
      return 4;
  }
}

// Throws where the number of columns, or of heads, is no int.
inline void check_count(int64_t n, const char* what) {
  if (n > INT32_MAX)
    throw std::invalid_argument("fusedattn: got x with " + std::to_string(n) + " " + what +
                                ", expected fewer than 2^31 on CUDA");
}

// Whether an absent tensor, or every row of this one, can be accessed n elements at a time.
inline bool takes_chunks(const TensorView& view, int dimensions, int n) {
  return !view || aligned(view, dimensions, n, element_bytes(view.dtype));
}

// function(T{}) with the element type that `dtype` names.
template <class Function>
FUSEDATTN_DEVICE void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f16:
      return function(f16{});
    case DType::bf16:
      return function(bf16{});
    default:
      return function(float{});
  }
}

// N elements from number i on, as they are, or as floats where their type is Any.
template <class T, int N>
FUSEDATTN_DEVICE Pack<Held<T>, N> fetch(const Matrix& m, int64_t i) {
  if constexpr (std::is_same_v<T, Any>) {
    Pack<float, N> result;
    with_type(m.dtype, [&](auto type) { result = widen(fetch<decltype(type), N>(m, i)); });
    return result;
  } else {
    return load<N>(static_cast<const T*>(m.data) + i);
  }
}

// The same, of elements that are read once.
template <class T, int N>
FUSEDATTN_DEVICE Pack<Held<T>, N> fetch_once(const Matrix& m, int64_t i) {
  if constexpr (std::is_same_v<T, Any>)
    return fetch<T, N>(m, i);
  else
    return load_streaming<N>(static_cast<const T*>(m.data) + i);
}

// Rounds x to the dtype of the matrix, writes it there, and returns what was written.
template <class T, int N>
FUSEDATTN_DEVICE Pack<float, N> put(const Matrix& m, int64_t i, const Pack<float, N>& x) {
  if constexpr (std::is_same_v<T, Any>) {
    Pack<float, N> result;
    with_type(m.dtype, [&](auto type) { result = put<decltype(type)>(m, i, x); });
    return result;
  } else {
    const Pack<T, N> rounded = narrow<T>(x);
    store(static_cast<T*>(m.data) + i, rounded);
    return widen(rounded);
  }
}

template <class T, int N>
FUSEDATTN_DEVICE Pack<T, N> filled(T value) {
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = value;
  return result;
}

// The chunks of one thread.
struct Chunks {
  int first, step, end;

  // function(k, number of the chunk) for the first K of them that exist.
  template <int K, class Function>
  FUSEDATTN_DEVICE void each(const Function& function) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (below(first + k * step, end)) function(k, first + k * step);
  }
};

// --- teams ---------------------------------------------------------------------------------------

struct Add {
  template <int M>
  FUSEDATTN_DEVICE Pack<float, M> operator()(const Pack<float, M>& a,
                                             const Pack<float, M>& b) const {
    Pack<float, M> result;
#pragma unroll
    for (int i = 0; i < M; ++i) result[i] = a[i] + b[i];
    return result;
  }
};

constexpr int max_threads = 512;
constexpr int max_cluster = 8;
constexpr int reduction_slots = max_threads / warp_size + max_cluster;
// Shared memory that a team's reductions need: two sets of slots, of 16 bytes at most.
constexpr int reduction_bytes = 2 * reduction_slots * 16;

// The threads of one row: a power of two within a warp, or whole warps, or all blocks of a cluster.
// All teams of a block must make the same calls.
class Team {
 public:
  const int size, index, rank;  // threads, which team of the block, which thread of the team

  FUSEDATTN_DEVICE explicit Team(int size)
      : size(size), index(thread() / size), rank(thread() % size) {}

  // The same in every thread and every run: the order of merging is fixed.
  template <int M, class Merge>
  FUSEDATTN_DEVICE Pack<float, M> reduce(Pack<float, M> x, const Merge& merge) {
    for (int mask = (size < warp_size ? size : warp_size) / 2; mask > 0; mask /= 2) {
      Pack<float, M> other;
#pragma unroll
      for (int i = 0; i < M; ++i) other[i] = shuffle_xor(x[i], mask);
      x = merge(x, other);
    }
    if (size <= warp_size) return x;
    // Two sets of slots in turn: whoever writes into one again has passed the barrier that all
    // threads reach after they have read it.
    auto* slots = reinterpret_cast<Pack<float, M>*>(shared_memory() + turn_ * reduction_bytes / 2);
    turn_ ^= 1;
    if (lane() == 0) store_shared(slots + warp(), x);
    sync_block();
    x = merge_slots(slots + index * (size / warp_size), size / warp_size, merge);
    if (cluster_size() == 1) return x;
    slots += max_threads / warp_size;
    if (below(thread(), cluster_size()))
      store_remote(remote_shared(slots + cluster_rank(), thread()), x);
    sync_cluster();
    return merge_slots(slots, cluster_size(), merge);
  }

 private:
  template <int M, class Merge>
  FUSEDATTN_DEVICE static Pack<float, M> merge_slots(const Pack<float, M>* slots, int count,
                                                     const Merge& merge) {
    Pack<float, M> x = load_shared(slots);
    for (int i = 1; below(i, count); ++i) x = merge(x, load_shared(slots + i));
    return x;
  }

  int turn_ = 0;
};

// How rows are laid over teams.
struct TeamShape {
  int team;   // threads
  int teams;  // in a block
};

inline int round_up(int64_t n, int unit) { return int((n + unit - 1) / unit * unit); }

inline int power_of_two(int64_t at_least) {
  int result = 1;
  while (result < at_least) result *= 2;
  return result;
}

// A team for rows of `chunks` chunks, `each` to a thread, in blocks of at least `block` threads.
inline TeamShape team_shape(int64_t chunks, int each, int block) {
  const int64_t threads = (chunks + each - 1) / each;
  const int team = threads <= warp_size ? power_of_two(threads) : round_up(threads, warp_size);
  return {team, team < block ? block / team : 1};
}

// A row that no team holds in registers: blocks of max_threads, alone or in a cluster, each with a
// run of chunks, of which the first stay in shared memory as floats.
struct WideShape {
  int cluster;
  int run;   // chunks of a block
  int kept;  // of these in shared memory
  int shared_bytes;
};

inline WideShape wide_shape(int64_t chunks, int chunk_bytes, int device) {
  WideShape shape;
  // Two blocks on each multiprocessor, so that one reads while the other reduces or writes.
  const int most = max_shared_bytes(device);
  const int half = most / 2 - 1024 - reduction_bytes;
  shape.cluster = 1;
  while (capability(device) >= 90 && shape.cluster < max_cluster &&
         chunks * chunk_bytes > int64_t(half) * shape.cluster)
    shape.cluster *= 2;
  shape.run = int((chunks + shape.cluster - 1) / shape.cluster);
  const int room = (most - reduction_bytes) / chunk_bytes;
  shape.kept = shape.run < room ? shape.run : room;
  shape.shared_bytes = reduction_bytes + shape.kept * chunk_bytes;
  return shape;
}

}  // namespace fusedattn::cuda
