// The part of DLPack's C exchange protocol that reads a tensor without taking hold of it.
// Layouts as in the DLPack 1.3 specification, https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace fusedattn::dlpack {

struct Device {
  int32_t type, id;
};

constexpr int32_t device_cpu = 1, device_cuda = 2;

enum TypeCode : uint8_t { type_int = 0, type_float = 2, type_bfloat = 4, type_bool = 6 };

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  Type dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// `type(tensor).__dlpack_c_exchange_api__` is a capsule of this name around this table.
inline constexpr const char* capsule_name = "dlpack_exchange_api";

struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* older;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, Tensor* out);  // borrows; may be null
  void* current_stream;
};

}  // namespace fusedattn::dlpack
