#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/linear_dense.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

void bind_linear_dense([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "linear_dense",
        [](TensorRef x, TensorRef weight, TensorRef bias, TensorRef y, int64_t k, int64_t context) {
            run<CpuBackend>(LinearDenseArgs{x, weight, bias, y, k}, context, cpu::linear_dense);
        },
        "x"_a, "weight"_a, "bias"_a, "y"_a, "k"_a, "context"_a);
#endif
}

}  // namespace pyqlora
