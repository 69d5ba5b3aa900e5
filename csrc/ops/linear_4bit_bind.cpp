#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/linear_4bit.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

template <class Backend, class Linear>
void bind(py::module_& m, Linear linear_4bit) {
    m.def(
        "linear_4bit",
        [=](TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
            TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
            int64_t blocksize, const std::string& type, int64_t context) {
            run<Backend>(Linear4bitArgs{x,
                                        packed,
                                        {absmax, nested_absmax, nested_code, offset, nested_blocksize},
                                        bias,
                                        y,
                                        n,
                                        k,
                                        blocksize,
                                        quant_type(type)},
                         context, linear_4bit);
        },
        "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
        "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "context"_a);
}

#if PYQLORA_BIND_CUDA
void bind_mma(py::module_& m) {
    m.def(
        "linear_4bit_mma",
        [](TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
           TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
           int64_t blocksize, const std::string& type, TensorRef workspace, TensorRef s, TensorRef b, int64_t context) {
            run<CudaBackend>(Linear4bitMmaArgs{{x,
                                                packed,
                                                {absmax, nested_absmax, nested_code, offset, nested_blocksize},
                                                bias,
                                                y,
                                                n,
                                                k,
                                                blocksize,
                                                quant_type(type)},
                                               workspace,
                                               s,
                                               b},
                             context, cuda::linear_4bit_mma);
        },
        "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
        "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "workspace"_a, "s"_a, "b"_a, "context"_a);
    m.def("linear_4bit_mma_splits", &cuda::linear_4bit_mma_splits, "m"_a, "n"_a, "k"_a, "multiprocessors"_a);
}
#endif

}  // namespace

void bind_linear_4bit([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::linear_4bit);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::linear_4bit);
    bind_mma(cuda);
#endif
}

}  // namespace pyqlora
