#include "ops/lora_linear_4bit.h"

#include <vector>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

#if PYQLORA_BIND_CPU
void lora_linear_4bit(TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
                      TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
                      int64_t blocksize, const std::string& type, TensorRef a, TensorRef b, float scale, TensorRef seed,
                      double dropout, TensorRef s, bool int16, int64_t context) {
    std::vector<float> own;
    if (!s.defined() && k > 0) {  // the caller does not keep it
        own.resize(x.numel / k * (a.numel / k));
        s = {own.data(), static_cast<int64_t>(own.size()), DType::f32, Device::cpu};
    }
    const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
    const LoraDownArgs down{DType::f32, x, {{a}, k}, {scale}, {}, {seed, dropout}, s, {}};
    const Linear4bitArgs linear{x, packed, scales, bias, y, n, k, blocksize, quant_type(type), s, b};
    run<CpuBackend>(LoraLinear4bitArgs{down, linear, int16}, context, cpu::lora_linear_4bit);
}

void lora_linear_4bit_backward(TensorRef dy, TensorRef packed, TensorRef absmax, TensorRef nested_absmax,
                               TensorRef nested_code, TensorRef offset, int64_t nested_blocksize, TensorRef dx,
                               int64_t n, int64_t k, int64_t blocksize, const std::string& type, TensorRef x,
                               TensorRef a, TensorRef b, TensorRef s, double scale, TensorRef seed, double dropout,
                               TensorRef da, TensorRef db, int64_t context) {
    std::vector<float> own(s.numel);
    const TensorRef ds{own.data(), s.numel, DType::f32, Device::cpu};
    const Scales scales{absmax, nested_absmax, nested_code, offset, nested_blocksize};
    const LoraBackwardArgs of_b{DType::f32, dy, b, s, scale, {{}, 0.0}, ds, db, false, {}, {}, n};
    const LoraBackwardArgs of_a{DType::f32, x, {}, ds, 1.0, {seed, dropout}, {}, da, true, {}, {}, k};
    const Linear4bitBackwardArgs linear{dy, packed, scales, dx, n, k, blocksize, quant_type(type)};
    run<CpuBackend>(LoraLinear4bitBackwardArgs{of_b, of_a, linear, a}, context, cpu::lora_linear_4bit_backward);
}
#endif

}  // namespace

void bind_lora_linear_4bit([[maybe_unused]] py::module_& cpu, py::module_&) {
#if PYQLORA_BIND_CPU
    cpu.def("lora_linear_4bit", &lora_linear_4bit, "x"_a, "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a,
            "offset"_a, "nested_blocksize"_a, "bias"_a, "y"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "a"_a,
            "b"_a, "scale"_a, "seed"_a, "dropout"_a, "s"_a, "int16"_a, "context"_a);
    cpu.def("lora_linear_4bit_backward", &lora_linear_4bit_backward, "dy"_a, "packed"_a, "absmax"_a, "nested_absmax"_a,
            "nested_code"_a, "offset"_a, "nested_blocksize"_a, "dx"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a,
            "x"_a, "a"_a, "b"_a, "s"_a, "scale"_a, "seed"_a, "dropout"_a, "da"_a, "db"_a, "context"_a);
#endif
}

}  // namespace pyqlora
