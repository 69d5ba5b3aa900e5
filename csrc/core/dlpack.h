// What we use of DLPack's C table for exchanging tensors (https://dmlc.github.io/dlpack, version 1): the frameworks put
// it on their tensor types as the capsule __dlpack_c_exchange_api__.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyqlora::dlpack {

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

// Describes a tensor that stays its owner's. 0, or -1 with a Python exception set.
using FromPyObject = int (*)(void* py_object, Tensor* out);

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;  // of another major version
    void* unused[3];
    FromPyObject from_py_object;  // may be null
};

// The function of a tensor type, or null.
inline FromPyObject from_py_object(pybind11::handle type) {
    const pybind11::object capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->major != 1) api = api->previous;
    return api ? api->from_py_object : nullptr;
}

}  // namespace pyqlora::dlpack
