// A call of fusedattn.ops, which is a NamedTuple, as the parameter struct of a kernel. Each op has
// a table of its fields, bind_<op>.h; a test holds the names equal to those of the NamedTuple.
#pragma once

#include <iterator>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"

namespace fusedattn::bindings {

enum class Read {
  view,            // of up to four dimensions, the last ones 1
  last,            // of up to four dimensions, the first ones 1
  broadcast,       // view; a dimension of size 1 is read again and again
  broadcast_last,  // last; likewise
  matrix,          // (…, width) as (rows, width)
  table,           // (T, n) or (1 or B, T, n), as the latter
  unread           // an option that is not for kernels
};

// A field of a call, or an output.
template <class Params>
struct Field {
  const char* name;
  TensorView Params::* to = nullptr;
  Read how = Read::view;
};

// A field of a config; an enum's numbers go from 0 to that of `last`.
template <class Options, class T>
struct Option {
  const char* name;
  T Options::* to;
  T last = {};
};

// One that kernels do not read.
struct Unread {
  const char* name;
};

// Of every parameter struct:
//   name      of the function
//   fields    of the call, without its last one, the config
//   outputs   what the function writes to
//   config    its fields, as a tuple of `Option` and `Unread`
template <class Params>
struct Call;

inline TensorView read_field(Reader& reader, const char* name, Read how, py::handle given) {
  switch (how) {
    case Read::view:
      return reader.view(name, given);
    case Read::last:
      return reader.view(name, given, Align::last);
    case Read::broadcast:
      return reader.broadcast(name, given);
    case Read::broadcast_last:
      return reader.broadcast(name, given, Align::last);
    case Read::matrix:
      return reader.matrix(name, given);
    case Read::table:
      return reader.table(name, given);
    case Read::unread:
      break;
  }
  return {};
}

template <class Params>
void read_into(Params& params, Reader& reader, const Field<Params>& field, py::handle given) {
  const TensorView view = read_field(reader, field.name, field.how, given);
  if (field.to != nullptr) params.*field.to = view;
}

template <class Options, class T>
T enumerator(const Option<Options, T>& option, int value) {
  if (value < 0 || value > int(option.last))
    throw py::value_error(std::string("fusedattn: got ") + option.name + " " +
                          std::to_string(value) + ", expected 0 to " +
                          std::to_string(int(option.last)));
  return T(value);
}

template <class Options, class T>
void read_into(Options& options, const Option<Options, T>& option, py::handle given) {
  py::detail::make_caster<std::conditional_t<std::is_enum_v<T>, int, T>> caster;
  if (!caster.load(given, true))
    throw py::type_error(std::string("fusedattn: got ") + option.name + " of type " +
                         Py_TYPE(given.ptr())->tp_name);
  if constexpr (std::is_enum_v<T>)
    options.*option.to = enumerator(option, py::detail::cast_op<int>(caster));
  else
    options.*option.to = py::detail::cast_op<T>(caster);
}

template <class Options>
void read_into(Options&, const Unread&, py::handle) {}

// Throws unless `given` is a tuple of so many fields.
inline void expect_fields(const char* what, py::handle given, size_t expected) {
  if (PyTuple_Check(given.ptr()) && size_t(PyTuple_GET_SIZE(given.ptr())) == expected) return;
  throw py::type_error(std::string("fusedattn: got ") + what + " of type " +
                       Py_TYPE(given.ptr())->tp_name + ", expected a tuple of " +
                       std::to_string(expected));
}

template <class Params>
auto options_of(py::handle config) {
  constexpr const auto& fields = Call<Params>::config;
  constexpr size_t n = std::tuple_size_v<std::remove_cvref_t<decltype(fields)>>;
  expect_fields("config", config, n);
  decltype(Params::options) options;
  [&]<size_t... i>(std::index_sequence<i...>) {
    (read_into(options, std::get<i>(fields), PyTuple_GET_ITEM(config.ptr(), i)), ...);
  }(std::make_index_sequence<n>());
  return options;
}

template <class Params>
constexpr size_t outputs_of = std::size(Call<Params>::outputs);

// What fields say together; nothing, for most ops.
template <class Params>
void settle(Params&) {}

template <class Params>
Params read(py::handle call, const py::handle (&outputs)[outputs_of<Params>]) {
  constexpr const auto& fields = Call<Params>::fields;
  constexpr size_t n = std::size(fields);
  expect_fields("call", call, n + 1);
  Params params;
  Reader reader;
  for (size_t i = 0; i < n; ++i)
    read_into(params, reader, fields[i], PyTuple_GET_ITEM(call.ptr(), i));
  for (size_t i = 0; i < outputs_of<Params>; ++i)
    read_into(params, reader, Call<Params>::outputs[i], outputs[i]);
  params.options = options_of<Params>(PyTuple_GET_ITEM(call.ptr(), n));
  settle(params);
  return params;
}

// <name>(call, outputs…, stream), and the names of its fields in the module's `fields`.
template <class Params, class Run>
void bind(py::module_& m, const Run& run) {
  using Op = Call<Params>;
  [&]<size_t... i>(std::index_sequence<i...>) {
    m.def(
        Op::name,
        [run](py::handle call, std::conditional_t<i, py::handle, py::handle>... outputs,
              Stream stream) { run_checked(run, read<Params>(call, {outputs...}), stream); },
        py::arg("call"), py::arg(Op::outputs[i].name)..., py::arg("stream") = Stream(0),
        "Writes the outputs that are given.");
  }(std::make_index_sequence<outputs_of<Params>>());

  const auto names = [](const auto&... rows) { return py::make_tuple(rows.name...); };
  const auto all = [](const auto& rows) {
    py::list found;
    for (const auto& row : rows) found.append(row.name);
    return py::tuple(found);
  };
  if (!py::hasattr(m, "fields")) m.attr("fields") = py::dict();
  m.attr("fields")[Op::name] =
      py::make_tuple(all(Op::fields), std::apply(names, Op::config), all(Op::outputs));
}

}  // namespace fusedattn::bindings
