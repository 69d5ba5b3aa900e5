// torch.Tensor -> TensorRef, by attributes: the only C++ that knows torch exists. None gives an undefined TensorRef.
#pragma once
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace pyqlora {

// The few torch objects that the caster compares with; looked up on first use, kept for the life of the process.
struct TorchNames {
    PyObject *f32, *f16, *bf16, *u8, *i32, *i64;
    PyObject *data_ptr, *numel, *dtype, *is_cpu, *device, *type, *index, *is_contiguous;

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
        data_ptr = intern("data_ptr"), numel = intern("numel"), dtype = intern("dtype"), device = intern("device");
        type = intern("type"), index = intern("index"), is_contiguous = intern("is_contiguous");
        is_cpu = intern("is_cpu");
    }
};

inline TensorRef tensor_ref(pybind11::handle t) {
    namespace py = pybind11;
    const TorchNames& n = TorchNames::get();
    auto own = [](PyObject* o) {
        if (!o) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(o);
    };
    auto call = [&](PyObject* method) { return own(PyObject_CallMethodNoArgs(t.ptr(), method)); };
    TensorRef r;
    r.data = reinterpret_cast<void*>(call(n.data_ptr).cast<uintptr_t>());
    r.numel = call(n.numel).cast<int64_t>();
    r.contiguous = call(n.is_contiguous).cast<bool>();
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
        if (!hasattr(src, pyqlora::TorchNames::get().is_cpu)) return false;
        value = pyqlora::tensor_ref(src);
        return true;
    }
};
}  // namespace pybind11::detail
