// Softmax over rows, which lie along memory or side by side.
//
// A row of up to `chunk` columns is read once: its exponentials wait in L1 until their sum is
// known. A wider row is a series of chunks, each with its own maximum and sum (Milakov and
// Gimelshein 2018), that threads may share; they are combined in order, so that neither the number
// of threads nor trailing columns that are masked change a bit of the result.
#include "softmax_backward.h"
#include "softmax_columns.h"
#include "softmax_forward.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

// Rows of one chunk.
template <class Rows, class Params>
void run_narrow(const Params& p, int threads) {
  typedef typename Rows::S S;
  const Rows rows{p};
  const bool plain = rows.plain();
  on_threads(threads, [&] {
    const bool done = plain && with_vectors<S>(p.width(), [&](auto vectors) {
                        const ShortRow<typename Rows::Element, vectors()> row(p.width());
                        for_rows(p, [&](const Index& at) { rows.short_row(at, row); });
                        drain();
                      });
    if (done) return;
    alignas(64) S copy[2 * chunk];
    if (plain)
      rows.plain_rows(copy);
    else
      for_rows(p, [&](const Index& at) { rows.narrow(at, copy); });
    drain();
  });
}

// Rows of several chunks: a thread each, or, where rows are few, all threads on one after another.
template <class Rows, class Params>
void run_wide(const Params& p, int threads) {
  const Rows rows{p};
  const int64_t count = p.rows(), chunks = ceil_div(p.width(), chunk);
  const bool shared = count < 8 * threads && threads > 1;
  typedef decltype(rows.part(Index{}, 0, nullptr)) Piece;
  Arena own_part;
  own_part.take<Piece>(chunks);
  // While some threads still combine one row, others write the parts of the next.
  const Workspace workspace(0, own_part.used(), larger(threads, 2));
  on_threads(threads, [&] {
    alignas(64) typename Rows::S copy[2 * chunk];
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = shared ? 0 : count * me / team;
    const int64_t last = shared ? count : count * (me + 1) / team;
    const int64_t c0 = shared ? chunks * me / team : 0;
    const int64_t c1 = shared ? chunks * (me + 1) / team : chunks;
    Index at = index_of(p, first);
    for (int64_t r = first; r < last; ++r) {
      Piece* const own = workspace.own(shared ? r % 2 : me).template take<Piece>(chunks);
      for (int64_t c = c0; c < c1; ++c) own[c] = rows.part(at, c, copy);
      if (shared) {
#pragma omp barrier
      }
      const Piece row = rows.combine(own, chunks);
      for (int64_t c = c0; c < c1; ++c) rows.finish(at, c, row, copy);
      at.next(p);
    }
    drain();
  });
}

template <class Rows, class Params>
void run_rows(const Params& p) {
  const int threads = threads_for_elements(p.work());
  p.width() <= chunk ? run_narrow<Rows>(p, threads) : run_wide<Rows>(p, threads);
}

template <class T>
bool softmax_forward(const SoftmaxForward& p) {
  SoftmaxForward q = p;
  if (p.x.stride[3] != 1 && columns_of(q, width<compute_t<T>>))
    forward_columns<T>(q);
  else
    run_rows<ForwardRows<T>>(p);
  return true;
}

template <class T>
bool softmax_backward(const SoftmaxBackward& p) {
  SoftmaxBackward q = p;
  if (p.out.stride[3] != 1 && columns_of(q, width<compute_t<T>>))
    backward_columns<T>(q);
  else
    run_rows<BackwardRows<T>>(p);
  return true;
}

}  // namespace

SoftmaxKernels softmax_kernels() {
  return by_dtype<SoftmaxKernels>([]<class T>(SoftmaxKernels& kernels, DType dtype) {
    kernel_for<SoftmaxForward>(kernels, dtype) = {softmax_forward<T>};
    kernel_for<SoftmaxBackward>(kernels, dtype) = {softmax_backward<T>};
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
