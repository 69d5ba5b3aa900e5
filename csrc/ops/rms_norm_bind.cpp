#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/rms_norm.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

void bind_rms_norm([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "rms_norm",
        [](TensorRef x, TensorRef weight, double eps, TensorRef y, TensorRef rstd, int64_t context) {
            run<CpuBackend>(RmsNormArgs{x, weight, eps, y, rstd}, context, cpu::rms_norm);
        },
        "x"_a, "weight"_a, "eps"_a, "y"_a, "rstd"_a, "context"_a);
    cpu_module.def(
        "rms_norm_backward",
        [](TensorRef x, TensorRef weight, TensorRef rstd, TensorRef dy, TensorRef dx, int64_t context) {
            run<CpuBackend>(RmsNormBackwardArgs{x, weight, rstd, dy, dx}, context, cpu::rms_norm_backward);
        },
        "x"_a, "weight"_a, "rstd"_a, "dy"_a, "dx"_a, "context"_a);
#endif
}

}  // namespace pyqlora
