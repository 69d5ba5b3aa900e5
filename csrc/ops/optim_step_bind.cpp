#include "ops/optim_step.h"

#include <pybind11/stl.h>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {

void bind_optim_step([[maybe_unused]] pybind11::module_& cpu) {
    using namespace pybind11::literals;
    using Tensors = std::vector<TensorRef>;
#if PYQLORA_BIND_CPU
    cpu.def(
        "optim_step",
        [](const std::string& rule, std::vector<int64_t> steps, Tensors params, Tensors grads, Tensors state1,
           Tensors state2, Tensors absmax1, Tensors absmax2, TensorRef qmap1, TensorRef qmap2, Tensors unorm, double lr,
           double beta1, double beta2, double beta3, double alpha, double eps, double weight_decay, double max_unorm,
           int64_t context) {
            const OptimStepArgs args{optim_rule(rule),
                                     {lr, beta1, beta2, beta3, alpha, eps, weight_decay},
                                     std::move(steps),
                                     std::move(params),
                                     std::move(grads),
                                     std::move(state1),
                                     std::move(state2),
                                     std::move(absmax1),
                                     std::move(absmax2),
                                     qmap1,
                                     qmap2,
                                     max_unorm,
                                     std::move(unorm)};
            run<CpuBackend>(args, context, cpu::optim_step);
        },
        "rule"_a, "steps"_a, "params"_a, "grads"_a, "state1"_a, "state2"_a, "absmax1"_a, "absmax2"_a, "qmap1"_a,
        "qmap2"_a, "unorm"_a, "lr"_a, "beta1"_a, "beta2"_a, "beta3"_a, "alpha"_a, "eps"_a, "weight_decay"_a,
        "max_unorm"_a, "context"_a);
#endif
}

}  // namespace pyqlora
