#include "ops/optim_step.h"

#include <pybind11/stl.h>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

template <class Backend, class Step>
void bind(py::module_& m, Step optim_step) {
    using Tensors = std::vector<TensorRef>;
    m.def(
        "optim_step",
        [=](const std::string& rule, std::vector<int64_t> steps, Tensors params, Tensors grads, Tensors state1,
            Tensors state2, Tensors absmax1, Tensors absmax2, TensorRef qmap1, TensorRef qmap2, Tensors unorm,
            TensorRef workspace, double lr, double beta1, double beta2, double beta3, double alpha, double eps,
            double weight_decay, double max_unorm, int64_t context) {
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
                                     std::move(unorm),
                                     workspace};
            run<Backend>(args, context, optim_step);
        },
        "rule"_a, "steps"_a, "params"_a, "grads"_a, "state1"_a, "state2"_a, "absmax1"_a, "absmax2"_a, "qmap1"_a,
        "qmap2"_a, "unorm"_a, "workspace"_a, "lr"_a, "beta1"_a, "beta2"_a, "beta3"_a, "alpha"_a, "eps"_a,
        "weight_decay"_a, "max_unorm"_a, "context"_a);
}

}  // namespace

void bind_optim_step([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::optim_step);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::optim_step);
#endif
}

}  // namespace pyqlora
