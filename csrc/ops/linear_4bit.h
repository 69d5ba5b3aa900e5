// linear_4bit: y = x · dequant(W)ᵀ + bias for few rows of x, with the weight decoded in registers. (For many rows the
// caller decodes W piece by piece and leaves the product to a GEMM.)
#pragma once
#include "ops/quantize.h"

namespace pyqlora {

struct Linear4bitArgs {
    TensorRef x;       // f32, f16 or bf16 [m, k]
    TensorRef packed;  // u8 [(n * k + 1) / 2]
    Scales scales;
    TensorRef bias;  // f32, f16 or bf16 [n], or None
    TensorRef y;     // x's dtype [m, n], out
    int64_t n, k;    // the shape of W
    int64_t blocksize;
    QuantType type;

    int64_t m() const { return k ? x.numel / k : 0; }
};

inline void check(const Linear4bitArgs& a, Device device) {
    const char* op = "linear_4bit";
    if (a.n < 1 || a.k < 1)
        bad_argument(op, "shape", "[N, K], both positive",
                     "[" + std::to_string(a.n) + ", " + std::to_string(a.k) + "]");
    check_blocksize(op, a.blocksize, 32);
    check_tensor(op, "packed", a.packed, device, {DType::u8}, (a.n * a.k + 1) / 2);
    check_scales(op, a.scales, device, ceil_div(a.n * a.k, a.blocksize));
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_tensor(op, "y", a.y, device, {a.x.dtype}, a.m() * a.n);
    if (a.bias.defined()) check_tensor(op, "bias", a.bias, device, {DType::f32, DType::f16, DType::bf16}, a.n);
    check_same_device(op, {{"x", a.x},
                           {"packed", a.packed},
                           {"absmax", a.scales.absmax},
                           {"nested_absmax", a.scales.nested_absmax},
                           {"nested_code", a.scales.nested_code},
                           {"offset", a.scales.offset},
                           {"bias", a.bias},
                           {"y", a.y}});
}

namespace cpu {
void linear_4bit(const Linear4bitArgs& a, int threads);
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void linear_4bit(const Linear4bitArgs& a, void* stream);
}  // namespace cuda

}  // namespace pyqlora
