// torch.Tensor -> TensorRef: the only C++ that knows torch exists. None gives an undefined TensorRef. The tensor is
// read through DLPack's C table where torch has one (some ten times faster), else by its attributes.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "core/dlpack.h"
#include "core/tensor.h"
#if defined(PYQLORA_EMULATION)
#include "engine.h"
#endif

namespace pyqlora {

// The few torch objects that the caster compares with; looked up on first use, kept for the life of the process.
struct TorchNames {
    PyObject *f32, *f16, *bf16, *u8, *i32, *i64;
    PyObject *data_ptr, *shape, *stride, *dtype, *is_cpu, *device, *type, *index;
    PyTypeObject* tensor;
    const dlpack::ExchangeApi* dlpack;  // or null

    static const TorchNames& get() {
        static const TorchNames* names = new TorchNames(pybind11::module_::import("torch"));
        return *names;
    }

  private:
    explicit TorchNames(const pybind11::module_& torch) {
        auto attr = [&](const char* n) { return pybind11::object(torch.attr(n)).release().ptr(); };
        f32 = attr("float32"), f16 = attr("float16"), bf16 = attr("bfloat16");
        u8 = attr("uint8"), i32 = attr("int32"), i64 = attr("int64");
        auto intern = [](const char* n) { return PyUnicode_InternFromString(n); };
        data_ptr = intern("data_ptr"), shape = intern("shape"), stride = intern("stride"), dtype = intern("dtype");
        device = intern("device"), type = intern("type"), index = intern("index"), is_cpu = intern("is_cpu");
        tensor = reinterpret_cast<PyTypeObject*>(attr("Tensor"));
        dlpack = dlpack::exchange_api(torch.attr("Tensor"));
    }
};

// False where the tensor cannot be described so, or has no memory.
inline bool read_dlpack(dlpack::FromPyObject from_py_object, PyObject* t, TensorRef& r) {
    dlpack::Tensor d;
    if (from_py_object(t, &d)) {
        PyErr_Clear();
        return false;
    }
    r.set_shape(d.ndim, d.shape, d.strides);
    r.data = static_cast<char*>(d.data) + d.byte_offset;
    if ((!d.data && r.numel) || d.lanes != 1) return false;
    switch (d.code << 8 | d.bits) {
        case dlpack::floating << 8 | 32:
            r.dtype = DType::f32;
            break;
        case dlpack::floating << 8 | 16:
            r.dtype = DType::f16;
            break;
        case dlpack::bfloat << 8 | 16:
            r.dtype = DType::bf16;
            break;
        case dlpack::unsigned_integer << 8 | 8:
            r.dtype = DType::u8;
            break;
        case dlpack::integer << 8 | 32:
            r.dtype = DType::i32;
            break;
        case dlpack::integer << 8 | 64:
            r.dtype = DType::i64;
            break;
        default:
            r.dtype = DType::other;
    }
    r.device = d.device_type == dlpack::cpu ? Device::cpu : Device::cuda;
    r.device_index = d.device_type == dlpack::cpu ? 0 : d.device_id;
    return d.device_type == dlpack::cpu || d.device_type == dlpack::cuda;
}

inline TensorRef tensor_ref(pybind11::handle t) {
    namespace py = pybind11;
    const TorchNames& n = TorchNames::get();
    TensorRef r;
    if (n.dlpack && n.dlpack->from_py_object && read_dlpack(n.dlpack->from_py_object, t.ptr(), r)) return r;
    r = TensorRef();
    auto own = [](PyObject* o) {
        if (!o) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(o);
    };
    auto call = [&](PyObject* method) { return own(PyObject_CallMethodNoArgs(t.ptr(), method)); };
    r.data = reinterpret_cast<void*>(call(n.data_ptr).cast<uintptr_t>());
    const auto sizes = py::object(own(PyObject_GetAttr(t.ptr(), n.shape))).cast<std::vector<int64_t>>();
    const auto strides = call(n.stride).cast<std::vector<int64_t>>();
    r.set_shape(static_cast<int>(sizes.size()), sizes.data(), strides.data());
    const py::object dtype = own(PyObject_GetAttr(t.ptr(), n.dtype));
    r.dtype = dtype.ptr() == n.f32    ? DType::f32
              : dtype.ptr() == n.f16  ? DType::f16
              : dtype.ptr() == n.bf16 ? DType::bf16
              : dtype.ptr() == n.u8   ? DType::u8
              : dtype.ptr() == n.i32  ? DType::i32
              : dtype.ptr() == n.i64  ? DType::i64
                                      : DType::other;
    if (own(PyObject_GetAttr(t.ptr(), n.is_cpu)).ptr() == Py_True) {  // one look-up where a torch.device needs four
        r.device = Device::cpu;
        return r;
    }
    const py::object device = own(PyObject_GetAttr(t.ptr(), n.device));
    const auto type = own(PyObject_GetAttr(device.ptr(), n.type)).cast<std::string>();
    if (type != "cuda") bad_argument("pyqlora", "device", "cpu or cuda", type);
    r.device = Device::cuda;
    r.device_index = own(PyObject_GetAttr(device.ptr(), n.index)).cast<int>();
    return r;
}

}  // namespace pyqlora

namespace pybind11::detail {
template <>
struct type_caster<pyqlora::TensorRef> {
    PYBIND11_TYPE_CASTER(pyqlora::TensorRef, const_name("torch.Tensor | None"));
    bool load(handle src, bool) {
        if (src.is_none()) return true;
        if (!PyType_IsSubtype(Py_TYPE(src.ptr()), pyqlora::TorchNames::get().tensor)) return false;
        value = pyqlora::tensor_ref(src);
#if defined(PYQLORA_EMULATION)
        value.device_index = emulation::device_of(value.data);
#endif
        return true;
    }
};
}  // namespace pybind11::detail
