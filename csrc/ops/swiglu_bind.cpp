#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/swiglu.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

void bind_swiglu([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "swiglu",
        [](TensorRef gate, TensorRef up, TensorRef y, int64_t context) {
            run<CpuBackend>(SwigluArgs{gate, up, y}, context, cpu::swiglu);
        },
        "gate"_a, "up"_a, "y"_a, "context"_a);
    cpu_module.def(
        "swiglu_backward",
        [](TensorRef gate, TensorRef up, TensorRef dy, TensorRef dgate, TensorRef dup, int64_t context) {
            run<CpuBackend>(SwigluBackwardArgs{gate, up, dy, dgate, dup}, context, cpu::swiglu_backward);
        },
        "gate"_a, "up"_a, "dy"_a, "dgate"_a, "dup"_a, "context"_a);
#endif
}

}  // namespace pyqlora
