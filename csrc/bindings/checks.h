// What a native function demands of its arguments, so that whoever calls it, a traced program or a
// test, no kernel leaves its tensors. fusedattn.ops asks for the same before, in better words.
#pragma once

#include "tensor.h"

namespace fusedattn::bindings {

// Up to four, the rest 1.
struct Sizes {
  int64_t of[4];
  Sizes(int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) : of{a, b, c, d} {}
};

// One argument. An absent one passes every check but given(). Inlined always: small calls are many,
// and to call a check takes longer than the check.
class Argument {
 public:
  Argument(const char* name, const TensorView& view) : name_(name), view_(view) {}

  FUSEDATTN_MEMBER const Argument& given() const {
    if (!view_) refuse_none();
    return *this;
  }
  // Kernels divide by sizes: what is empty the op layer answers.
  FUSEDATTN_MEMBER const Argument& filled() const {
    for (const int64_t size : view_.shape)
      if (size == 0) refuse("size 0", "at least one element");
    return *this;
  }
  FUSEDATTN_MEMBER const Argument& shape(const Sizes& sizes) const {
    int64_t apart = 0;
    for (int i = 0; i < 4; ++i) apart |= view_.shape[i] ^ sizes.of[i];
    if (apart != 0 && view_) refuse_shape(sizes);
    return *this;
  }
  // Each dimension full or 1.
  FUSEDATTN_MEMBER const Argument& broadcasts(const Sizes& sizes) const {
    if (!view_) return *this;
    for (int i = 0; i < 4; ++i)
      if (view_.shape[i] != sizes.of[i] && view_.shape[i] != 1) refuse_shape(sizes);
    return *this;
  }
  // Elements, or those of each row of a matrix, next to each other.
  FUSEDATTN_MEMBER const Argument& dense(int dimension = 0) const {
    if (view_.stride[dimension] != 1 && view_.shape[dimension] != 1 && view_)
      refuse("a stride other than 1", "1");
    return *this;
  }
  FUSEDATTN_MEMBER const Argument& dtype(DType expected) const {
    return of(view_.dtype == expected, names[int(expected)]);
  }
  FUSEDATTN_MEMBER const Argument& floating() const {
    return of(int(view_.dtype) < float_dtypes, "floating point");
  }
  // float64 only where that is computed in; with `alike` there nothing else either.
  FUSEDATTN_MEMBER const Argument& floating_beside(DType computed, bool alike = false) const {
    const bool both = computed == DType::f64, own = view_.dtype == DType::f64;
    return floating().of(own == both || (both && !alike), both ? "float64" : "float32 or less");
  }
  FUSEDATTN_MEMBER const Argument& integer() const {
    return of(view_.dtype == DType::i32 || view_.dtype == DType::i64, "int32 or int64");
  }

 private:
  static constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64",
                                          "bool",    "int32",    "int64"};

  FUSEDATTN_MEMBER const Argument& of(bool right, const char* expected) const {
    if (!right && view_) refuse(names[int(view_.dtype)], expected);
    return *this;
  }

  [[noreturn]] void refuse_none() const {
    throw py::type_error(std::string("fusedattn: got no ") + name_);
  }
  [[noreturn]] void refuse_shape(const Sizes& expected) const {
    const auto text = [](const int64_t* n) {
      std::string result = "shape (" + std::to_string(n[0]);
      for (int i = 1; i < 4; ++i) result += ", " + std::to_string(n[i]);
      return result + ")";
    };
    refuse(text(view_.shape).c_str(), text(expected.of).c_str());
  }
  [[noreturn]] void refuse(const char* got, const char* expected) const {
    throw py::value_error(std::string("fusedattn: got ") + name_ + " of " + got + ", expected " +
                          expected);
  }

  const char* name_;
  const TensorView& view_;
};

// The dtype of statistics.
inline DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Throws where arguments do not fit together; bind_<op>.h has that of its op.
template <class Params>
void check(const Params& params);

template <class Run, class Params>
void run_checked(const Run& run, const Params& params, Stream stream) {
  check(params);
  const WithoutGil release;
  run(params, stream);
}

}  // namespace fusedattn::bindings
