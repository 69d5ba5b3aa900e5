#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"
#include "ops/linear_4bit.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

#if PYQLORA_BIND_CPU
template <class Args, class Linear>
void bind_forward(py::module_& m, const char* name, Linear linear) {
    m.def(
        name,
        [=](TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
            TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
            int64_t blocksize, const std::string& type, int64_t context) {
            const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
            const Linear4bitArgs args{x, packed, scales, bias, y, n, k, blocksize, quant_type(type), {}, {}};
            run<CpuBackend>(Args{args}, context, linear);
        },
        "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
        "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "context"_a);
}

void bind_cpu(py::module_& m) {
    bind_forward<Linear4bitArgs>(m, "linear_4bit", cpu::linear_4bit);
    bind_forward<Linear4bitInt16Args>(m, "linear_4bit_int16", cpu::linear_4bit_int16);
    m.def(
        "linear_4bit_backward",
        [](TensorRef dy, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
           TensorRef offset, int64_t nested_blocksize, TensorRef dx, int64_t n, int64_t k, int64_t blocksize,
           const std::string& type, int64_t context) {
            const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
            run<CpuBackend>(Linear4bitBackwardArgs{dy, packed, scales, dx, n, k, blocksize, quant_type(type)}, context,
                            cpu::linear_4bit_backward);
        },
        "dy"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "dx"_a,
        "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "context"_a);
}
#endif

#if PYQLORA_BIND_CUDA
void bind_cuda(py::module_& m) {
    m.def(
        "linear_4bit",
        [](TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
           TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
           int64_t blocksize, const std::string& type, int64_t context) {
            const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
            run<CudaBackend>(Linear4bitArgs{x, packed, scales, bias, y, n, k, blocksize, quant_type(type), {}, {}},
                             context, cuda::linear_4bit);
        },
        "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
        "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "context"_a);
    m.def(
        "linear_4bit_mma",
        [](TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
           TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
           int64_t blocksize, const std::string& type, TensorRef workspace, TensorRef s, TensorRef b, int64_t context) {
            const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
            const Linear4bitArgs linear{x, packed, scales, bias, y, n, k, blocksize, quant_type(type), s, b};
            run<CudaBackend>(Linear4bitMmaArgs{linear, workspace}, context, cuda::linear_4bit_mma);
        },
        "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
        "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "workspace"_a, "s"_a, "b"_a, "context"_a);
    m.def("linear_4bit_mma_splits", &cuda::linear_4bit_mma_splits, "m"_a, "n"_a, "k"_a, "multiprocessors"_a);
}
#endif

}  // namespace

void bind_linear_4bit([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind_cpu(cpu);
#endif
#if PYQLORA_BIND_CUDA
    bind_cuda(cuda);
#endif
}

}  // namespace pyqlora
