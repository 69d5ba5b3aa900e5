#include "ops/quantize.h"

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

template <class Backend, class Q4, class D4, class Q8, class D8>
void bind(py::module_& m, Q4 quantize_4bit, D4 dequantize_4bit, Q8 quantize_blockwise, D8 dequantize_blockwise) {
    m.def(
        "quantize_4bit",
        [=](TensorRef x, TensorRef packed, TensorRef absmax, int64_t blocksize, const std::string& type,
            int64_t context) {
            run<Backend>(Quantize4bitArgs{x, packed, absmax, blocksize, quant_type(type)}, context, quantize_4bit);
        },
        "x"_a, "packed"_a, "absmax"_a, "blocksize"_a, "quant_type"_a, "context"_a);
    m.def(
        "dequantize_4bit",
        [=](TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code, TensorRef offset,
            int64_t nested_blocksize, TensorRef out, int64_t numel, int64_t first, int64_t blocksize,
            const std::string& type, int64_t context) {
            run<Backend>(Dequantize4bitArgs{packed,
                                            {absmax, nested_absmax, nested_code, offset, nested_blocksize},
                                            out,
                                            numel,
                                            first,
                                            blocksize,
                                            quant_type(type)},
                         context, dequantize_4bit);
        },
        "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "out"_a,
        "numel"_a, "first"_a, "blocksize"_a, "quant_type"_a, "context"_a);
    m.def(
        "quantize_blockwise",
        [=](TensorRef x, TensorRef code, TensorRef q, TensorRef absmax, int64_t blocksize, int64_t context) {
            run<Backend>(QuantizeBlockwiseArgs{x, code, q, absmax, blocksize}, context, quantize_blockwise);
        },
        "x"_a, "code"_a, "q"_a, "absmax"_a, "blocksize"_a, "context"_a);
    m.def(
        "dequantize_blockwise",
        [=](TensorRef q, TensorRef code, TensorRef absmax, TensorRef out, int64_t blocksize, int64_t context) {
            run<Backend>(DequantizeBlockwiseArgs{q, code, absmax, out, blocksize}, context, dequantize_blockwise);
        },
        "q"_a, "code"_a, "absmax"_a, "out"_a, "blocksize"_a, "context"_a);
}

}  // namespace

void bind_quantize([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::quantize_4bit, cpu::dequantize_4bit, cpu::quantize_blockwise, cpu::dequantize_blockwise);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::quantize_4bit, cuda::dequantize_4bit, cuda::quantize_blockwise,
                      cuda::dequantize_blockwise);
#endif
}

}  // namespace pyqlora
