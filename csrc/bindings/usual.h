// Whether a call on the CPU is the usual one, of plain tensors that fit together: then it needs
// none of Python's checks, which say what is wrong but take longer than a small kernel, and is run
// at once, with its outputs allocated. Anything unusual is no, and looked at there.
#pragma once

#include "bind_norm.h"
#include "bind_softmax.h"

namespace fusedattn::bindings {

inline PyTypeObject* tensor_type = nullptr;
inline PyTypeObject* parameter_type = nullptr;
inline PyObject* is_neg = nullptr;      // Tensor.is_neg
inline PyObject* empty_like = nullptr;  // torch.empty_like
inline PyObject* empty = nullptr;       // torch.empty
inline PyObject* float32 = nullptr;
inline PyObject* float64 = nullptr;
inline PyObject* dtype_name = nullptr;          // "dtype"
inline PyObject* requires_grad_name = nullptr;  // "requires_grad"
inline PyObject* cpu = nullptr;                 // torch.device("cpu")
inline PyObject* vector_keywords = nullptr;     // ("dtype", "device")

inline py::object empty_as(py::handle tensor) {
  return owned(PyObject_CallOneArg(empty_like, tensor.ptr()));
}

// On the CPU, whatever torch.set_default_device says.
inline py::object empty_vector(int64_t n, PyObject* dtype) {
  const py::object length = owned(PyLong_FromLongLong(n));
  PyObject* const arguments[] = {length.ptr(), dtype, cpu};
  return owned(PyObject_Vectorcall(empty, arguments, 1, vector_keywords));
}

// Whether it stands for the negative of its memory, as z.conj().imag does.
inline bool is_negative(py::handle tensor) {
  return !owned(PyObject_CallOneArg(is_neg, tensor.ptr())).is(py::handle(Py_False));
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
            raw.dimensions > 0 && elements(raw) > 0 && !without_storage(tensor, raw) &&
            !is_negative(tensor);
  }

  explicit operator bool() const { return found; }
  int rank() const { return raw.dimensions; }
  int64_t width() const { return raw.shape[raw.dimensions - 1]; }
  int64_t rows() const {
    int64_t count = 1;
    for (int i = 0; i < raw.dimensions - 1; ++i) count *= raw.shape[i];
    return count;
  }
  bool is_double() const { return raw.dtype.bits == 64; }

  bool is_contiguous() const { return bindings::is_contiguous(raw); }
  bool has_shape_of(const Usual& other) const {
    if (raw.dimensions != other.raw.dimensions) return false;
    for (int i = 0; i < raw.dimensions; ++i)
      if (raw.shape[i] != other.raw.shape[i]) return false;
    return true;
  }
  bool is_contiguous_like(const Usual& other) const {
    return found && is_contiguous() && has_shape_of(other);
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
  return added.is_contiguous_like(input) && !residual.is(x) &&
         (input.is_double() || !added.is_double());
}

inline bool requires_grad(py::handle tensor) {
  return !tensor.is_none() &&
         owned(PyObject_GetAttr(tensor.ptr(), requires_grad_name)).is(py::handle(Py_True));
}

// Whether a gradient of `dtype`, if one is wanted, is like a tensor.
inline bool is_like(py::handle dtype, py::handle tensor) {
  if (dtype.is_none()) return true;
  return !tensor.is_none() && owned(PyObject_GetAttr(tensor.ptr(), dtype_name)).is(dtype);
}

inline bool usual_norm_backward(py::handle dout, py::handle dz, py::handle z, py::handle weight,
                                py::handle mean, py::handle rstd, const py::tuple& dtypes) {
  const Usual input(z);
  return input && input.is_contiguous() && Usual(dout).is_contiguous_like(input) &&
         (dz.is_none() || Usual(dz).is_contiguous_like(input)) &&
         is_vector(weight, input.width()) && is_vector(mean, input.rows()) &&
         is_vector(rstd, input.rows()) && is_like(dtypes[0], dout) && is_like(dtypes[1], z) &&
         is_like(dtypes[2], weight) && is_like(dtypes[3], weight);
}

// Along the last dimension of at most four.
inline bool usual_softmax(const Usual& input, py::handle dim) {
  if (!input || input.rank() > 4 || !PyLong_CheckExact(dim.ptr())) return false;
  int overflow = 0;
  const long long last = PyLong_AsLongLongAndOverflow(dim.ptr(), &overflow);
  return overflow == 0 && (last == -1 || last == input.rank() - 1);
}

inline void import_usual() {
  const py::module_ torch = py::module_::import("torch");
  const auto keep = [](const py::object& found) { return py::object(found).release().ptr(); };
  tensor_type = reinterpret_cast<PyTypeObject*>(keep(torch.attr("Tensor")));
  parameter_type = reinterpret_cast<PyTypeObject*>(keep(torch.attr("nn").attr("Parameter")));
  is_neg = keep(torch.attr("Tensor").attr("is_neg"));
  empty_like = keep(torch.attr("empty_like"));
  empty = keep(torch.attr("empty"));
  float32 = keep(torch.attr("float32"));
  float64 = keep(torch.attr("float64"));
  dtype_name = keep(py::str("dtype"));
  requires_grad_name = keep(py::str("requires_grad"));
  cpu = keep(torch.attr("device")("cpu"));
  vector_keywords = keep(py::make_tuple("dtype", "device"));
}

// run(params, stream) serves a call.
template <class Run>
void bind_usual_norm(py::module_& m, const Run& run) {
  m.def(
      "usual_norm_forward",
      [run](py::handle x, py::handle normalized_shape, py::handle weight, py::handle bias,
            py::handle residual, const py::tuple& config, bool with_gradient) -> py::object {
        if (!usual_norm(x, normalized_shape, weight, bias, residual)) return py::none();
        Reader read;
        const TensorView source = read.matrix("x", x);
        const NormOptions options = options_of<NormForward>(config);
        const bool statistics = with_gradient && (requires_grad(x) || requires_grad(residual) ||
                                                  requires_grad(weight) || requires_grad(bias));
        PyObject* const wide = source.dtype == DType::f64 ? float64 : float32;
        const py::object none = py::none(), out = empty_as(x);
        const py::object z = residual.is_none() ? none : empty_as(residual);
        const py::object rstd = statistics ? empty_vector(source.shape[0], wide) : none;
        const py::object mean = statistics && options.centre ? empty_as(rstd) : none;
        const NormForward params{source,
                                 read.matrix("residual", residual),
                                 read.view("weight", weight),
                                 read.view("bias", bias),
                                 TensorView{},
                                 read.matrix("out", out),
                                 read.matrix("z", z),
                                 read.view("mean", mean),
                                 read.view("rstd", rstd),
                                 options};
        run_checked(run, params, Stream(0));
        return py::make_tuple(out, z, mean, rstd);
      },
      py::arg("x"), py::arg("normalized_shape"), py::arg("weight"), py::arg("bias"),
      py::arg("residual"), py::arg("config"), py::arg("with_gradient"),
      "(out, z, mean, rstd) of such a call, rstd None unless `with_gradient` and a tensor requires "
      "one; None where Python has to look.");
  m.def(
      "usual_norm_backward",
      [run](py::handle dout, py::handle dz, py::handle z, py::handle weight, py::handle mean,
            py::handle rstd, const py::tuple& dtypes, const py::tuple& config) -> py::object {
        if (!usual_norm_backward(dout, dz, z, weight, mean, rstd, dtypes)) return py::none();
        const auto gradient = [&](int i, py::handle like) {
          return py::handle(dtypes[i]).is_none() ? py::object(py::none()) : empty_as(like);
        };
        const py::object dx = gradient(0, dout), dresidual = gradient(1, z);
        const py::object dweight = gradient(2, weight), dbias = gradient(3, weight);
        Reader read;
        const NormBackward params{read.matrix("dout", dout),
                                  read.matrix("dz", dz),
                                  read.matrix("z", z),
                                  read.view("weight", weight),
                                  read.view("mean", mean),
                                  read.view("rstd", rstd),
                                  TensorView{},
                                  read.matrix("dx", dx),
                                  read.matrix("dresidual", dresidual),
                                  read.view("dweight", dweight),
                                  read.view("dbias", dbias),
                                  options_of<NormBackward>(config)};
        run_checked(run, params, Stream(0));
        return py::make_tuple(dx, dresidual, dweight, dbias);
      },
      py::arg("dout"), py::arg("dz"), py::arg("z"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("dtypes"), py::arg("config"),
      "The gradients of such a call, each None where `dtypes` has None for it; None where Python "
      "has to look.");
}

template <class Run>
void bind_usual_softmax(py::module_& m, const Run& run) {
  m.def(
      "usual_softmax", [](py::handle x, py::handle dim) { return usual_softmax(Usual(x), dim); },
      py::arg("x"), py::arg("dim"),
      "Whether softmax_forward takes these as they are; False where Python has to look.");
  m.def(
      "usual_softmax_forward",
      [run](py::handle x, py::handle dim, const py::tuple& config) -> py::object {
        if (!usual_softmax(Usual(x), dim)) return py::none();
        py::object out = empty_as(x);
        Reader read;
        const SoftmaxForward params{read.view("x", x, Align::last), TensorView{}, TensorView{},
                                    read.view("out", out, Align::last),
                                    options_of<SoftmaxForward>(config)};
        run_checked(run, params, Stream(0));
        return out;
      },
      py::arg("x"), py::arg("dim"), py::arg("config"),
      "out of such a call; None where Python has to look.");
  m.def(
      "usual_softmax_backward",
      [run](py::handle dout, py::handle out, py::handle dim,
            const py::tuple& config) -> py::object {
        const Usual gradient(dout), result(out);
        if (!gradient || !usual_softmax(result, dim) || !gradient.has_shape_of(result))
          return py::none();
        py::object dx = empty_as(out);
        Reader read;
        const SoftmaxBackward params{
            read.view("dout", dout, Align::last), read.view("out", out, Align::last),
            read.view("dx", dx, Align::last), TensorView{}, options_of<SoftmaxBackward>(config)};
        run_checked(run, params, Stream(0));
        return dx;
      },
      py::arg("dout"), py::arg("out"), py::arg("dim"), py::arg("config"),
      "dx of such a call; None where Python has to look.");
}

}  // namespace fusedattn::bindings
