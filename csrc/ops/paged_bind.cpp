#include "ops/paged.h"

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

template <class Backend, class Prefetch>
void bind(py::module_& m, Prefetch prefetch) {
    m.def(
        "prefetch",
        [=](TensorRef tensor, bool to_cpu, int device, int64_t context) {
            run<Backend>(PrefetchArgs{tensor, to_cpu, device}, context, prefetch);
        },
        "tensor"_a, "to_cpu"_a, "device"_a, "context"_a);
}

#if PYQLORA_BIND_CUDA
void bind_memory(py::module_& m) {
    using cuda::PagedMemory;
    using Released = py::call_guard<py::gil_scoped_release>;
    auto stream = [](int64_t context) { return CudaBackend::context(context); };
    py::class_<PagedMemory>(m, "PagedMemory", py::buffer_protocol(), py::module_local(), "Zeros that a GPU pages.")
        .def(py::init<int64_t, int>(), "bytes"_a, "device"_a, Released())
        .def("fetch", [=](PagedMemory& p, TensorRef slot, int64_t context) { p.fetch(slot, stream(context)); })
        .def("finish", [=](PagedMemory& p, TensorRef slot, int64_t context) { p.finish(slot, stream(context)); })
        .def(
            "join", [=](PagedMemory& p, int64_t context) { p.join(stream(context)); }, "context"_a)
        .def("synchronize", &PagedMemory::synchronize, Released())
        .def_property_readonly("managed", &PagedMemory::managed)
        .def_property_readonly("pointer", [](const PagedMemory& p) { return reinterpret_cast<uintptr_t>(p.data()); })
        .def_property_readonly("__cuda_array_interface__",
                               [](const PagedMemory& p) {
                                   return py::dict(
                                       "shape"_a = py::make_tuple(p.bytes()), "typestr"_a = "|u1",
                                       "data"_a = py::make_tuple(reinterpret_cast<uintptr_t>(p.data()), false),
                                       "version"_a = 3, "strides"_a = py::none());
                               })
        .def_buffer([](PagedMemory& p) { return py::buffer_info(static_cast<uint8_t*>(p.data()), p.bytes()); });
}
#endif

}  // namespace

void bind_paged([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::prefetch);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::prefetch);
    bind_memory(cuda);
#endif
}

}  // namespace pyqlora
