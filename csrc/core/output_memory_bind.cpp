#include "core/output_memory.h"

#include <array>

#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using cpu::OutputMemory;

std::unique_ptr<OutputMemory> output_memory(int64_t bytes) {
    auto memory = OutputMemory::reuse(bytes);
    if (!memory) {
        py::gil_scoped_release others_may_run;
        memory = std::make_unique<OutputMemory>(bytes);
    }
    memory->count();
    return memory;
}

// What torch's tensor holds on to.
struct Output {
    static constexpr int kMostDims = 8;
    dlpack::ManagedTensor managed;
    std::array<int64_t, kMostDims> shape, strides;
    std::unique_ptr<OutputMemory> memory;
};

void release(dlpack::ManagedTensor* managed) {
    auto* output = static_cast<Output*>(managed->context);
    if (!Py_IsInitialized()) return;  // the process is ending: the kernel frees it
    py::gil_scoped_acquire as_its_users_do;
    delete output;
}

// A tensor over an OutputMemory in one call of torch's; None where torch has none for it.
py::object output_tensor(const py::tuple& shape, py::handle dtype) {
    const TorchNames& torch = TorchNames::get();
    dlpack::Tensor tensor{};
    if (dtype.ptr() == torch.f32) tensor.code = dlpack::floating, tensor.bits = 32;
    if (dtype.ptr() == torch.f16) tensor.code = dlpack::floating, tensor.bits = 16;
    if (dtype.ptr() == torch.bf16) tensor.code = dlpack::bfloat, tensor.bits = 16;
    if (dtype.ptr() == torch.u8) tensor.code = dlpack::unsigned_integer, tensor.bits = 8;
    if (!torch.dlpack || !tensor.bits || shape.size() > Output::kMostDims) return py::none();

    auto output = std::make_unique<Output>();
    tensor.ndim = static_cast<int32_t>(shape.size());
    int64_t count = 1;
    for (int i = tensor.ndim; i-- > 0; count *= output->shape[i]) {
        output->shape[i] = py::cast<int64_t>(shape[i]);
        output->strides[i] = count;
    }
    output->memory = output_memory(count * tensor.bits / 8);
    tensor.data = output->memory->data();
    tensor.device_type = dlpack::cpu;
    tensor.lanes = 1;
    tensor.shape = output->shape.data();
    tensor.strides = output->strides.data();
    output->managed = {{1, 0}, output.get(), release, 0, tensor};
    void* made = nullptr;
    if (torch.dlpack->to_py_object(&output->managed, &made)) throw py::error_already_set();
    output.release();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
}

}  // namespace

void bind_output_memory(py::module_& cpu) {
    using namespace py::literals;
    py::class_<OutputMemory>(cpu, "OutputMemory", py::buffer_protocol(), "Memory for one large result, as a buffer.")
        .def(py::init(&output_memory), "bytes"_a)
        .def_buffer([](OutputMemory& m) { return py::buffer_info(static_cast<uint8_t*>(m.data()), m.bytes()); });
    cpu.def("output_tensor", output_tensor, "shape"_a, "dtype"_a,
            "A tensor over such memory; None where torch has no call for it.");
}

}  // namespace pyqlora
