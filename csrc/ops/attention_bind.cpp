#include <pybind11/stl.h>

#include <array>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/attention.h"
#include "ops/bind.h"

namespace pyqlora {

namespace py = pybind11;
using namespace py::literals;

namespace {

AttentionInputs inputs(const TensorRef& q, const TensorRef& k, const TensorRef& v, const TensorRef& mask,
                       const std::array<int64_t, 9>& s, bool causal, double scale) {
    return {{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]}, q, k, v, mask, causal, scale};
}

}  // namespace

void bind_attention([[maybe_unused]] py::module_& cpu_module, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu_module.def(
        "attention",
        [](TensorRef q, TensorRef k, TensorRef v, TensorRef mask, std::array<int64_t, 9> sizes, bool causal,
           double scale, TensorRef out, TensorRef lse, int64_t context) {
            run<CpuBackend>(AttentionArgs{inputs(q, k, v, mask, sizes, causal, scale), out, lse}, context,
                            cpu::attention);
        },
        "q"_a, "k"_a, "v"_a, "mask"_a, "sizes"_a, "causal"_a, "scale"_a, "out"_a, "lse"_a, "context"_a);
    cpu_module.def(
        "attention_backward",
        [](TensorRef q, TensorRef k, TensorRef v, TensorRef mask, std::array<int64_t, 9> sizes, bool causal,
           double scale, TensorRef lse, TensorRef dout, TensorRef dq, TensorRef dk, TensorRef dv, int64_t context) {
            run<CpuBackend>(AttentionBackwardArgs{inputs(q, k, v, mask, sizes, causal, scale), lse, dout, dq, dk, dv},
                            context, cpu::attention_backward);
        },
        "q"_a, "k"_a, "v"_a, "mask"_a, "sizes"_a, "causal"_a, "scale"_a, "lse"_a, "dout"_a, "dq"_a, "dk"_a, "dv"_a,
        "context"_a);
#endif
}

}  // namespace pyqlora
