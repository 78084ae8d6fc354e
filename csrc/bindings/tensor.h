// Python's tensors as views, by DLPack's C exchange protocol; shared by every native module.
//
// A CPU's kernels are called without a stream: passing one costs more than its default.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack.h"
#include "tensor_view.h"

namespace fusedattn::bindings {

namespace py = pybind11;

inline const dlpack::ExchangeApi* exchange = nullptr;
inline int32_t device_type = dlpack::device_cpu;  // of the tensors that the module's kernels take
inline PyObject* storage_offset = nullptr;        // Tensor.storage_offset

// Set by the emulator's module, which learns of every tensor that kernels may touch; of none at
// the beginning of a call.
inline void (*seen)(const TensorView*) = nullptr;

// Lets other Python threads run meanwhile; pybind11's own does more than these calls need.
struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

inline py::object owned(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

inline DType dtype_of(const char* name, const dlpack::Type& type) {
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
  throw py::type_error(std::string("fusedattn: got ") + name + " of a dtype that no kernel takes");
}

inline int64_t elements(const dlpack::Tensor& raw) {
  int64_t count = 1;
  for (int i = 0; i < raw.dimensions; ++i) count *= raw.shape[i];
  return count;
}

inline bool is_contiguous(const dlpack::Tensor& raw) {
  int64_t step = 1;
  for (int i = raw.dimensions - 1; i >= 0; step *= raw.shape[i--])
    if (raw.strides[i] != step && raw.shape[i] != 1) return false;
  return true;
}

// Whether the tensor's storage was freed, or never was: torch then gives the offset into it for an
// address. Beyond the largest offset the question is saved.
inline bool without_storage(py::handle tensor, const dlpack::Tensor& raw) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(raw.data) + raw.byte_offset;
  if (address >> 40 != 0) return false;
  const py::object offset = owned(PyObject_CallOneArg(storage_offset, tensor.ptr()));
  return address == offset.cast<uintptr_t>() * (raw.dtype.bits / 8);
}

// Where the dimensions of a tensor of fewer than four go; the others have size 1.
enum class Align { first, last };

// The arguments of one call as views: tensors with data on one device, which the kernels can reach.
class Reader {
 public:
  Reader() {
    if (seen != nullptr) seen(nullptr);
  }

  TensorView view(const char* name, py::handle tensor, Align align = Align::first) {
    if (tensor.is_none()) return {};
    const dlpack::Tensor raw = borrow(name, tensor);
    if (raw.dimensions > 4) refuse(name, "more than four dimensions", "four at most");
    TensorView result = without_shape(name, raw);
    const int shift = align == Align::last ? 4 - raw.dimensions : 0;
    for (int i = 0; i < raw.dimensions; ++i) {
      result.shape[i + shift] = raw.shape[i];
      result.stride[i + shift] = raw.strides[i];
    }
    if (seen != nullptr) seen(&result);
    return result;
  }

  // (…, width) as (rows, width); a tensor of other than two dimensions is contiguous.
  TensorView matrix(const char* name, py::handle tensor) {
    if (tensor.is_none()) return {};
    const dlpack::Tensor raw = borrow(name, tensor);
    const int last = raw.dimensions - 1;
    if (last < 0) refuse(name, "no dimension", "(…, width)");
    if (last != 1 && !is_contiguous(raw)) refuse(name, "strides apart", "a contiguous tensor");
    TensorView result = without_shape(name, raw);
    for (int i = 0; i < last; ++i) result.shape[0] *= raw.shape[i];
    result.shape[1] = raw.shape[last];
    result.stride[0] = last == 1 ? raw.strides[0] : raw.shape[last];
    result.stride[1] = raw.strides[last];
    if (seen != nullptr) seen(&result);
    return result;
  }

  // mask and bias: a dimension of size 1 is read again and again.
  TensorView broadcast(const char* name, py::handle tensor, Align align = Align::first) {
    TensorView result = view(name, tensor, align);
    for (int i = 0; i < 4; ++i)
      if (result.shape[i] == 1) result.stride[i] = 0;
    return result;
  }

  // (T, n) or (1 or B, T, n) as the latter.
  TensorView table(const char* name, py::handle tensor) {
    TensorView result = broadcast(name, tensor, Align::last);
    if (result.shape[0] != 1) refuse(name, "four dimensions", "three at most");
    for (int i = 0; i < 3; ++i) {
      result.shape[i] = result.shape[i + 1];
      result.stride[i] = result.stride[i + 1];
    }
    result.shape[3] = 1;
    result.stride[3] = 0;
    return result;
  }

 private:
  dlpack::Tensor borrow(const char* name, py::handle tensor) {
    dlpack::Tensor raw;
    if (exchange->view_of_object(tensor.ptr(), &raw) != 0) refuse_unread(name, tensor);
    if (raw.device.type != device_type || (device_ >= 0 && raw.device.id != device_))
      refuse(name, "a tensor on another device", "one device, that of the kernels");
    device_ = raw.device.id;
    if (without_storage(tensor, raw) && elements(raw) != 0) refuse_freed(name);
    return raw;
  }

  static TensorView without_shape(const char* name, const dlpack::Tensor& raw) {
    TensorView result;
    result.data = static_cast<char*>(raw.data) + raw.byte_offset;
    result.dtype = dtype_of(name, raw.dtype);
    result.device = raw.device.id;
    return result;
  }

  [[noreturn]] static void refuse_unread(const char* name, py::handle tensor) {
    // Torch's own message says why a tensor has no address.
    const py::error_already_set error;
    if (py::isinstance(tensor, py::module_::import("torch").attr("Tensor"))) throw error;
    throw py::type_error(std::string("fusedattn: got ") + name + " of type " +
                         Py_TYPE(tensor.ptr())->tp_name + ", expected a Tensor");
  }
  [[noreturn]] static void refuse_freed(const char* name) {
    throw std::runtime_error(std::string("fusedattn: ") + name +
                             " has elements but no data: its storage was freed");
  }
  [[noreturn]] static void refuse(const char* name, const char* got, const char* expected) {
    throw py::value_error(std::string("fusedattn: got ") + name + " of " + got + ", expected " +
                          expected);
  }

  int32_t device_ = -1;
};

// Called once by a module, before any Reader. `type`: DLPack's name of where its tensors are.
inline void import_exchange(int32_t type = dlpack::device_cpu) {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  exchange = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->header.major != 1 || exchange->view_of_object == nullptr)
    throw py::import_error("this torch speaks another version of DLPack's exchange protocol");
  storage_offset = py::object(tensor.attr("storage_offset")).release().ptr();
  device_type = type;
}

}  // namespace fusedattn::bindings
