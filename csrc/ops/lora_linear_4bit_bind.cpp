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
// What a call has beside its activations. Made once where calls repeat: reading so many tensors takes as long as a
// small product.
class LoraLinear4bit {
  public:
    LoraLinear4bit(TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code, TensorRef offset,
                   int64_t nested_blocksize, TensorRef bias, int64_t n, int64_t k, int64_t blocksize,
                   const std::string& type, TensorRef a, TensorRef b, float scale)
        : args_{{DType::f32, {}, {{a}, k}, {scale}, {}, {{}, 0.0}, {}, {}},
                {{},
                 packed,
                 {absmax, nested_absmax, nested_code, offset, nested_blocksize},
                 bias,
                 {},
                 n,
                 k,
                 blocksize,
                 quant_type(type),
                 {},
                 b},
                false} {}

    void run(TensorRef x, TensorRef y, TensorRef seed, double dropout, TensorRef s, bool int16, int64_t context) const {
        LoraLinear4bitArgs args = args_;
        std::vector<float> own;
        const int64_t k = args.linear.k;
        if (!s.defined() && k > 0) {  // the caller does not keep it
            own.resize(x.numel / k * (args.down.a.factors[0].numel / k));
            s = {own.data(), static_cast<int64_t>(own.size()), DType::f32, Device::cpu};
        }
        args.down.x = args.linear.x = x;
        args.down.s = args.linear.s = s;
        args.down.dropout = {seed, dropout};
        args.linear.y = y;
        args.int16 = int16;
        pyqlora::run<CpuBackend>(args, context, cpu::lora_linear_4bit);
    }

  private:
    LoraLinear4bitArgs args_;
};

void lora_linear_4bit(TensorRef x, TensorRef packed, TensorRef absmax, TensorRef nested_absmax, TensorRef nested_code,
                      TensorRef offset, int64_t nested_blocksize, TensorRef bias, TensorRef y, int64_t n, int64_t k,
                      int64_t blocksize, const std::string& type, TensorRef a, TensorRef b, float scale, TensorRef seed,
                      double dropout, TensorRef s, bool int16, int64_t context) {
    LoraLinear4bit(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, bias, n, k, blocksize, type, a,
                   b, scale)
        .run(x, y, seed, dropout, s, int16, context);
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
    py::class_<LoraLinear4bit>(cpu, "LoraLinear4bit")
        .def(py::init<TensorRef, TensorRef, TensorRef, TensorRef, TensorRef, int64_t, TensorRef, int64_t, int64_t,
                      int64_t, const std::string&, TensorRef, TensorRef, float>(),
             "packed"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "offset"_a, "nested_blocksize"_a, "bias"_a,
             "n"_a, "k"_a, "blocksize"_a, "quant_type"_a, "a"_a, "b"_a, "scale"_a, py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>(), py::keep_alive<1, 6>(),
             py::keep_alive<1, 8>(), py::keep_alive<1, 13>(), py::keep_alive<1, 14>())
        .def(
            "run",
            [](const LoraLinear4bit& self, TensorRef x, TensorRef y, bool int16, int64_t context) {
                self.run(x, y, {}, 0.0, {}, int16, context);
            },
            "x"_a, "y"_a, "int16"_a, "context"_a);
    cpu.def("lora_linear_4bit_backward", &lora_linear_4bit_backward, "dy"_a, "packed"_a, "absmax"_a, "nested_absmax"_a,
            "nested_code"_a, "offset"_a, "nested_blocksize"_a, "dx"_a, "n"_a, "k"_a, "blocksize"_a, "quant_type"_a,
            "x"_a, "a"_a, "b"_a, "s"_a, "scale"_a, "seed"_a, "dropout"_a, "da"_a, "db"_a, "context"_a);
#endif
}

}  // namespace pyqlora
