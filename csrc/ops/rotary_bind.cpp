#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/rotary.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

void bind_rotary([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "rotary",
        [](TensorRef x, TensorRef cos, TensorRef sin, int64_t heads, int64_t dim, bool backward, TensorRef y,
           int64_t context) {
            run<CpuBackend>(RotaryArgs{x, cos, sin, heads, dim, backward, y}, context, cpu::rotary);
        },
        "x"_a, "cos"_a, "sin"_a, "heads"_a, "dim"_a, "backward"_a, "y"_a, "context"_a);
#endif
}

}  // namespace pyqlora
