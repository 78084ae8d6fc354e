// Whether a call on the CPU is the usual one, of plain tensors that fit together: then it needs
// none of Python's checks, which say what is wrong but take longer than a small kernel; a norm
// without a gradient is run at once. Anything unusual is no, and looked at there.
#pragma once

#include "bind_norm.h"

namespace fusedattn::bindings {

inline PyTypeObject* tensor_type = nullptr;
inline PyTypeObject* parameter_type = nullptr;
inline PyObject* is_neg = nullptr;      // Tensor.is_neg
inline PyObject* empty_like = nullptr;  // torch.empty_like

inline py::object empty_as(py::handle tensor) {
  PyObject* const made = PyObject_CallOneArg(empty_like, tensor.ptr());
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// Whether it stands for the negative of its memory, as z.conj().imag does.
inline bool is_negative(py::handle tensor) {
  PyObject* const answer = PyObject_CallOneArg(is_neg, tensor.ptr());
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer != Py_False;
}

// A Tensor or Parameter itself, floating-point, on the CPU, not empty and not negative.
class Usual {
  dlpack::Tensor raw;
  bool found = false;

 public:
  explicit Usual(py::handle tensor) {
    const PyTypeObject* const type = Py_TYPE(tensor.ptr());
    if (type != tensor_type && type != parameter_type) return;
    if (exchange->view_of_object(tensor.ptr(), &raw) != 0) {
      PyErr_Clear();
      return;
    }
    const bool floating = raw.dtype.code == dlpack::type_float
                              ? raw.dtype.bits >= 16
                              : raw.dtype.code == dlpack::type_bfloat;
    found = floating && raw.dtype.lanes == 1 && raw.device.type == dlpack::device_cpu &&
            raw.data != nullptr && raw.dimensions > 0;
    for (int i = 0; found && i < raw.dimensions; ++i) found = raw.shape[i] > 0;
    found = found && !is_negative(tensor);
  }

  explicit operator bool() const { return found; }
  int rank() const { return raw.dimensions; }
  int64_t width() const { return raw.shape[raw.dimensions - 1]; }
  bool is_double() const { return raw.dtype.bits == 64; }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int i = raw.dimensions - 1; i >= 0; step *= raw.shape[i--])
      if (raw.strides[i] != step && raw.shape[i] != 1) return false;
    return true;
  }
  bool has_shape_of(const Usual& other) const {
    if (raw.dimensions != other.raw.dimensions) return false;
    for (int i = 0; i < raw.dimensions; ++i)
      if (raw.shape[i] != other.raw.shape[i]) return false;
    return true;
  }
};

// normalized_shape is one int, or a list or tuple of it.
inline bool is_width(py::handle normalized_shape, int64_t width) {
  PyObject* given = normalized_shape.ptr();
  if (PyTuple_Check(given) && PyTuple_GET_SIZE(given) == 1)
    given = PyTuple_GET_ITEM(given, 0);
  else if (PyList_CheckExact(given) && PyList_GET_SIZE(given) == 1)
    given = PyList_GET_ITEM(given, 0);
  if (!PyLong_CheckExact(given)) return false;
  int overflow = 0;
  return PyLong_AsLongLongAndOverflow(given, &overflow) == width && overflow == 0;
}

// A weight or a bias of one dimension.
inline bool is_vector(py::handle tensor, int64_t width) {
  if (tensor.is_none()) return true;
  const Usual vector(tensor);
  return vector && vector.rank() == 1 && vector.width() == width && vector.is_contiguous();
}

// `residual` is another tensor than x, and in float64 only where x is.
inline bool usual_norm(py::handle x, py::handle normalized_shape, py::handle weight,
                       py::handle bias, py::handle residual) {
  const Usual input(x);
  if (!input || !input.is_contiguous() || !is_width(normalized_shape, input.width()) ||
      !is_vector(weight, input.width()) || !is_vector(bias, input.width()))
    return false;
  if (residual.is_none()) return true;
  const Usual added(residual);
  return added && added.is_contiguous() && added.has_shape_of(input) && !residual.is(x) &&
         (input.is_double() || !added.is_double());
}

// Along the last dimension of at most four.
inline bool usual_softmax(py::handle x, py::handle dim) {
  const Usual input(x);
  if (!input || input.rank() > 4 || !PyLong_CheckExact(dim.ptr())) return false;
  int overflow = 0;
  const long long last = PyLong_AsLongLongAndOverflow(dim.ptr(), &overflow);
  return overflow == 0 && (last == -1 || last == input.rank() - 1);
}

inline void bind_usual(py::module_& m, void (*norm_forward)(const NormForward&, Stream)) {
  const py::module_ torch = py::module_::import("torch");
  tensor_type = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  is_neg = py::object(torch.attr("Tensor").attr("is_neg")).release().ptr();
  empty_like = py::object(torch.attr("empty_like")).release().ptr();
  m.def("usual_norm", &usual_norm, py::arg("x"), py::arg("normalized_shape"), py::arg("weight"),
        py::arg("bias"), py::arg("residual"),
        "Whether norm_forward takes these as they are; False where Python has to look.");
  m.def(
      "usual_norm_forward",
      [norm_forward](py::handle x, py::handle normalized_shape, py::handle weight, py::handle bias,
                     py::handle residual, const py::tuple& config) -> py::object {
        if (!usual_norm(x, normalized_shape, weight, bias, residual)) return py::none();
        const py::object out = empty_as(x);
        const py::object z = residual.is_none() ? py::none() : empty_as(residual);
        {
          const NormForward params{matrix_view(x),      matrix_view(residual), view(weight),
                                   view(bias),          TensorView{},          matrix_view(out),
                                   matrix_view(z),      TensorView{},          TensorView{},
                                   norm_options(config)};
          const WithoutGil release;
          norm_forward(params, Stream(0));
        }
        return z.is_none() ? out : py::make_tuple(out, z);
      },
      py::arg("x"), py::arg("normalized_shape"), py::arg("weight"), py::arg("bias"),
      py::arg("residual"), py::arg("config"),
      "out, with a residual (out, z), of such a call; None where Python has to look.");
  m.def("usual_softmax", &usual_softmax, py::arg("x"), py::arg("dim"),
        "Whether softmax_forward takes these as they are; False where Python has to look.");
}

}  // namespace fusedattn::bindings
