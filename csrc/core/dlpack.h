// What we use of DLPack's C table for exchanging tensors (https://dmlc.github.io/dlpack, version 1): the frameworks put
// it on their tensor types as the capsule __dlpack_c_exchange_api__.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyqlora::dlpack {

struct Version {
    uint32_t major, minor;
};

enum DeviceType : int32_t { cpu = 1, cuda = 2 };
enum TypeCode : uint8_t { integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };

struct Tensor {
    void* data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // in elements; strides may be null: row-major
    uint64_t byte_offset;
};

// A tensor whose last user calls `deleter`, from any thread.
struct ManagedTensor {
    Version version;
    void* context;
    void (*deleter)(ManagedTensor* self);
    uint64_t flags;
    Tensor tensor;
};

// Describes a tensor that stays its owner's. 0, or -1 with a Python exception set.
using FromPyObject = int (*)(void* py_object, Tensor* out);

// The framework's own tensor, a new reference, which takes the managed one. 0, or -1 with a Python exception set.
using ToPyObject = int (*)(ManagedTensor* tensor, void** py_object);

struct ExchangeApi {
    Version version;
    ExchangeApi* previous;  // of another major version
    void* unused[2];
    ToPyObject to_py_object;
    FromPyObject from_py_object;  // may be null
};

// The table of a tensor type, or null.
inline const ExchangeApi* exchange_api(pybind11::handle type) {
    const pybind11::object capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->version.major != 1) api = api->previous;
    return api;
}

}  // namespace pyqlora::dlpack
