// The Python module fusedattn._cpu: tensors in, by DLPack; the kernels of the best instruction set.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fusedattn {
namespace {

const dlpack::ExchangeApi* exchange = nullptr;

// Lets other Python threads run meanwhile; pybind11's own does more than these calls need.
struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

DType dtype_of(const dlpack::Type& type) {
  switch (type.code << 8 | type.bits) {
    case dlpack::type_float << 8 | 16:
      return DType::f16;
    case dlpack::type_float << 8 | 32:
      return DType::f32;
    case dlpack::type_float << 8 | 64:
      return DType::f64;
    case dlpack::type_bfloat << 8 | 16:
      return DType::bf16;
    case dlpack::type_bool << 8 | 8:
      return DType::boolean;
    case dlpack::type_int << 8 | 32:
      return DType::i32;
  }
  throw py::type_error("fusedattn._cpu: a tensor of this dtype is not supported");
}

TensorView view(py::handle tensor) {
  TensorView result;
  if (tensor.is_none()) return result;
  dlpack::Tensor raw;
  if (exchange->view_of_object(tensor.ptr(), &raw) != 0) throw py::error_already_set();
  if (raw.dimensions > 4) throw py::value_error("fusedattn._cpu: more than four dimensions");
  result.data = static_cast<char*>(raw.data) + raw.byte_offset;
  result.dtype = dtype_of(raw.dtype);
  for (int i = 0; i < raw.dimensions; ++i) {
    result.shape[i] = raw.shape[i];
    result.stride[i] = raw.strides[i];
  }
  return result;
}

// mask and bias: a dimension of size 1 is read again and again.
TensorView broadcast_view(py::handle tensor) {
  TensorView result = view(tensor);
  for (int i = 0; i < 4; ++i)
    if (result.shape[i] == 1) result.stride[i] = 0;
  return result;
}

// `config` is AttentionConfig of fusedattn/ops/attention_config.py.
void read_inputs(AttentionForward& params, py::handle q, py::handle k, py::handle v,
                 py::handle mask, py::handle bias, py::handle kv_lengths, py::handle out,
                 py::handle lse, const py::tuple& config) {
  params.q = view(q);
  params.k = view(k);
  params.v = view(v);
  params.mask = broadcast_view(mask);
  params.bias = broadcast_view(bias);
  params.kv_lengths = view(kv_lengths);
  params.out = view(out);
  params.lse = view(lse);
  params.options.causal = Causal(config[0].cast<int>());
  params.options.scale = config[1].cast<double>();
}

void forward(py::handle q, py::handle k, py::handle v, py::handle mask, py::handle bias,
             py::handle kv_lengths, py::handle out, py::handle lse, const py::tuple& config) {
  AttentionForward params;
  read_inputs(params, q, k, v, mask, bias, kv_lengths, out, lse, config);
  const WithoutGil release;
  attention_forward(params);
}

void backward(py::handle dout, py::handle dlse, py::handle q, py::handle k, py::handle v,
              py::handle out, py::handle lse, py::handle dq, py::handle dk, py::handle dv,
              py::handle dbias, py::handle mask, py::handle bias, py::handle kv_lengths,
              const py::tuple& config) {
  AttentionBackward params;
  read_inputs(params, q, k, v, mask, bias, kv_lengths, out, lse, config);
  params.dout = view(dout);
  params.dlse = view(dlse);
  params.dq = view(dq);
  params.dk = view(dk);
  params.dv = view(dv);
  params.dbias = broadcast_view(dbias);
  const WithoutGil release;
  attention_backward(params);
}

}  // namespace
}  // namespace fusedattn

PYBIND11_MODULE(_cpu, m) {
  using namespace fusedattn;
  m.doc() = "Native CPU kernels. Arguments are checked by fusedattn.ops; nothing is checked here.";
  const py::object capsule =
      py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  exchange = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->header.major != 1 || exchange->view_of_object == nullptr)
    throw py::import_error("this torch speaks another version of DLPack's exchange protocol");
  m.def("attention_forward", &forward, "Writes out and lse.");
  m.def("attention_backward", &backward, "Writes dq, dk, dv and, where given, dbias.");
  m.def("instruction_sets", &instruction_sets,
        "Names of the instruction sets usable on this processor, simplest first.");
  m.def("select_instruction_set", &select_instruction_set, py::arg("name"),
        "Use no better instruction set than this; 'auto' lifts the limit. For tests.");
  m.def("openmp_threads", &omp_get_max_threads, "Threads that a kernel uses.");
}
