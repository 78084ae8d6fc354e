// SwiGLU and its kin on NVIDIA GPUs, bound by memory: each element is read once and written once,
// 16 bytes at a time.
//
// A block takes some rows, or a part of a wide one: each thread so many packs of N, as far apart as
// there are threads on the row. N is 1 where alignment or a width allow no packs.
#include "swiglu.h"

#include "kernels.h"
#include "rowwise.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int threads = 128;
constexpr int together = 2;  // packs of a thread: four or six loads on their way
constexpr float log2_e = 1.4426950408889634f;

// Rows of a call, and how they are laid over threads.
template <class Params>
struct Work {
  Params p;
  int64_t rows, chunks;  // chunks of N elements in a row
  int team;              // threads of a row
  int64_t parts;         // blocks of a row
};

// --- activations ---------------------------------------------------------------------------------

// An activation but relu is x·s(x) with a smooth step s from 0 to 1; its slope is s + x·s′.
struct Step {
  float at, slope;
};

// By the exponential of −|x|, which is never large.
FUSEDATTN_DEVICE Step sigmoid(float x) {
  const float e = exp2((x < 0.0f ? x : -x) * log2_e), below = reciprocal(1.0f + e);
  return {x < 0.0f ? e * below : below, e * below * below};
}

template <Activation A>
FUSEDATTN_DEVICE Step step(float x) {
  if constexpr (A == Activation::silu) {
    return sigmoid(x);
  } else if constexpr (A == Activation::gelu) {
    const float y = x < 0.0f ? -x : x, e = exp2(x * x * (-0.5f * log2_e));
    const float tail = normal_tail(reciprocal(fma(0.35f, y, 1.0f)), e);
    const float far = x > 0.0f ? 1.0f - tail : tail;
    return {y < 1.25f ? normal_near_0(x) : far, e * 0.39894228f};
  } else {
    constexpr float cubic = 0.044715f, twice = 1.5957691216f;  // 2√(2/π)
    const float square = x * x;
    const Step s = sigmoid(x * twice * fma(square, cubic, 1.0f));
    // Cut off where the sigmoid is level.
    return {s.at, s.slope * twice * fma(square < 1e4f ? square : 1e4f, 3.0f * cubic, 1.0f)};
  }
}

template <Activation A>
FUSEDATTN_DEVICE float activated(float x) {
  if constexpr (A == Activation::relu)
    return x <= 0.0f ? 0.0f : x;
  else
    return x * step<A>(x).at;
}

// dgate from dout ∘ up, dup from dout.
template <Activation A>
FUSEDATTN_DEVICE void pull_back(float x, float& dgate, float& dup) {
  if constexpr (A == Activation::relu) {
    dgate = x <= 0.0f ? 0.0f : dgate;
    dup *= x <= 0.0f ? 0.0f : x;
  } else {
    const Step s = step<A>(x);
    dgate *= fma(x, s.slope, s.at);
    dup *= x * s.at;
  }
}

// function(the activation, as a constant)
template <class Function>
FUSEDATTN_DEVICE void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::silu:
      return function(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return function(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return function(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return function(std::integral_constant<Activation, Activation::relu>{});
  }
}

// --- kernels -------------------------------------------------------------------------------------

// Where the row of this thread lies, and its chunks of it.
struct Place {
  int64_t b, h, i, first, step;

  template <class Params>
  FUSEDATTN_DEVICE Place(const Work<Params>& work, const int64_t* shape) : step(work.team) {
    const int64_t row = block() / work.parts * (block_size() / work.team) + thread() / work.team;
    const int64_t matrix = row / shape[2];
    b = matrix / shape[1];
    h = matrix - b * shape[1];
    i = row - matrix * shape[2];
    first = block() % work.parts * (work.team * together) + thread() % work.team;
    if (!below(row, work.rows)) first = work.chunks;
  }

  template <class T>
  FUSEDATTN_DEVICE T* at(const TensorView& view) const {
    return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
           i * view.stride[2];
  }

  // function(k, the first element of chunk k), of those that exist.
  template <int N, class Function>
  FUSEDATTN_DEVICE void each(int64_t chunks, const Function& function) const {
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (below(first + k * step, chunks)) function(k, (first + k * step) * N);
  }
};

template <class T, int N>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 8)
    swiglu_forward(const FUSEDATTN_GRID_CONSTANT Work<SwigluForward> work) {
  const SwigluForward& p = work.p;
  const Place place(work, p.out.shape);
  Pack<T, N> gate[together] = {}, up[together] = {};
  place.each<N>(work.chunks, [&](int k, int64_t at) {
    gate[k] = load_streaming<N>(place.at<const T>(p.gate) + at);
    up[k] = load_streaming<N>(place.at<const T>(p.up) + at);
  });
  with_activation(p.options.activation, [&](auto activation) {
    place.each<N>(work.chunks, [&](int k, int64_t at) {
      const Pack<float, N> x = widen(gate[k]);
      Pack<float, N> y = widen(up[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] *= activated<activation()>(x[i]);
      store(place.at<T>(p.out) + at, narrow<T>(y));
    });
  });
}

template <class T, int N>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 6)
    swiglu_backward(const FUSEDATTN_GRID_CONSTANT Work<SwigluBackward> work) {
  const SwigluBackward& p = work.p;
  const Place place(work, p.dout.shape);
  Pack<T, N> dout[together] = {}, gate[together] = {}, up[together] = {};
  place.each<N>(work.chunks, [&](int k, int64_t at) {
    dout[k] = load_streaming<N>(place.at<const T>(p.dout) + at);
    gate[k] = load_streaming<N>(place.at<const T>(p.gate) + at);
    up[k] = load_streaming<N>(place.at<const T>(p.up) + at);
  });
  with_activation(p.options.activation, [&](auto activation) {
    place.each<N>(work.chunks, [&](int k, int64_t at) {
      const Pack<float, N> x = widen(gate[k]), u = widen(up[k]);
      Pack<float, N> dup = widen(dout[k]), dgate;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dgate[i] = dup[i] * u[i];
        pull_back<activation()>(x[i], dgate[i], dup[i]);
      }
      store(place.at<T>(p.dgate) + at, narrow<T>(dgate));
      store(place.at<T>(p.dup) + at, narrow<T>(dup));
    });
  });
}

// --- choice --------------------------------------------------------------------------------------

template <class Params>
void launch_rows(void (*kernel)(Work<Params>), const char* name, const Params& p, int64_t rows,
                 int64_t chunks, Stream stream) {
  const TeamShape teams =
      team_shape(chunks < threads * together ? chunks : threads * together, together, threads);
  Work<Params> work = {p, rows, chunks, teams.team, 1};
  work.parts = (chunks + work.team * together - 1) / (work.team * together);
  Launch shape;
  shape.grid = (rows + teams.teams - 1) / teams.teams * work.parts;
  shape.block = teams.team * teams.teams;
  shape.stream = stream;
  shape.device = p.gate.device;
  launch(name, kernel, shape, work);
}

// run(T{}, N) for chunks of N elements that all the tensors can be read in.
template <int Views, class Run>
void with_chunks(const TensorView* const (&views)[Views], const Run& run) {
  visit(views[0]->dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int n = pack_size<T>;
    bool packed = views[0]->shape[3] % n == 0;
    for (const TensorView* view : views) packed = packed && takes_chunks(*view, 4, n);
    if (packed)
      run(element, std::integral_constant<int, n>{});
    else
      run(element, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void run(const SwigluForward& call, Stream stream) {
  const SwigluForward p = as_rows(call);
  const int64_t* n = p.out.shape;
  with_chunks({&p.out, &p.gate, &p.up}, [&](auto element, auto size) {
    launch_rows(swiglu_forward<decltype(element), size()>, "swiglu_forward", p, n[0] * n[1] * n[2],
                n[3] / size(), stream);
  });
}

void run(const SwigluBackward& call, Stream stream) {
  const SwigluBackward p = as_rows(call);
  const int64_t* n = p.dout.shape;
  with_chunks({&p.dout, &p.gate, &p.up, &p.dgate, &p.dup}, [&](auto element, auto size) {
    launch_rows(swiglu_backward<decltype(element), size()>, "swiglu_backward", p,
                n[0] * n[1] * n[2], n[3] / size(), stream);
  });
}

}  // namespace fusedattn::cuda
