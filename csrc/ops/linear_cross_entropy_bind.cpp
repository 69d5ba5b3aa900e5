#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/linear_cross_entropy.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

void bind_linear_cross_entropy([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "logits",
        [](TensorRef x, TensorRef weight, TensorRef logits, int64_t k, int64_t context) {
            run<CpuBackend>(LogitsArgs{x, weight, logits, k}, context, cpu::logits);
        },
        "x"_a, "weight"_a, "logits"_a, "k"_a, "context"_a);
    cpu_module.def(
        "logits_backward",
        [](TensorRef dlogits, TensorRef weight, TensorRef dx, int64_t k, int64_t context) {
            run<CpuBackend>(LogitsBackwardArgs{dlogits, weight, dx, k}, context, cpu::logits_backward);
        },
        "dlogits"_a, "weight"_a, "dx"_a, "k"_a, "context"_a);
#endif
}

}  // namespace pyqlora
