// Python's tensors as views, by DLPack's C exchange protocol; shared by every native module.
//
// A CPU's kernels are called without a stream: passing one costs more than its default.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "tensor_view.h"

namespace fusedattn::bindings {

namespace py = pybind11;

inline const dlpack::ExchangeApi* exchange = nullptr;

// Set by the emulator's module, which learns of every tensor that kernels may touch.
inline void (*seen)(const TensorView&) = nullptr;

// Lets other Python threads run meanwhile; pybind11's own does more than these calls need.
struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

inline DType dtype_of(const dlpack::Type& type) {
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
    case dlpack::type_int << 8 | 64:
      return DType::i64;
  }
  throw py::type_error("fusedattn: a tensor of this dtype is not supported");
}

// Where the dimensions of a tensor of fewer than four go; the others have size 1.
enum class Align { first, last };

inline dlpack::Tensor borrow(py::handle tensor) {
  dlpack::Tensor raw;
  if (exchange->view_of_object(tensor.ptr(), &raw) != 0) throw py::error_already_set();
  return raw;
}

inline TensorView without_shape(const dlpack::Tensor& raw) {
  TensorView result;
  result.data = static_cast<char*>(raw.data) + raw.byte_offset;
  result.dtype = dtype_of(raw.dtype);
  result.device = raw.device.id;
  return result;
}

inline TensorView view(py::handle tensor, Align align = Align::first) {
  if (tensor.is_none()) return {};
  const dlpack::Tensor raw = borrow(tensor);
  if (raw.dimensions > 4) throw py::value_error("fusedattn: more than four dimensions");
  TensorView result = without_shape(raw);
  const int shift = align == Align::last ? 4 - raw.dimensions : 0;
  for (int i = 0; i < raw.dimensions; ++i) {
    result.shape[i + shift] = raw.shape[i];
    result.stride[i + shift] = raw.strides[i];
  }
  if (seen != nullptr) seen(result);
  return result;
}

// (…, width) as (rows, width); a tensor of other than two dimensions is contiguous.
inline TensorView matrix_view(py::handle tensor) {
  if (tensor.is_none()) return {};
  const dlpack::Tensor raw = borrow(tensor);
  const int last = raw.dimensions - 1;
  TensorView result = without_shape(raw);
  for (int i = 0; i < last; ++i) result.shape[0] *= raw.shape[i];
  result.shape[1] = raw.shape[last];
  result.stride[0] = last == 1 ? raw.strides[0] : raw.shape[last];
  result.stride[1] = raw.strides[last];
  if (seen != nullptr) seen(result);
  return result;
}

// mask and bias: a dimension of size 1 is read again and again.
inline TensorView broadcast_view(py::handle tensor, Align align = Align::first) {
  TensorView result = view(tensor, align);
  for (int i = 0; i < 4; ++i)
    if (result.shape[i] == 1) result.stride[i] = 0;
  return result;
}

// Called once by a module, before any view().
inline void import_exchange() {
  const py::object capsule =
      py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  exchange = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->header.major != 1 || exchange->view_of_object == nullptr)
    throw py::import_error("this torch speaks another version of DLPack's exchange protocol");
}

}  // namespace fusedattn::bindings
