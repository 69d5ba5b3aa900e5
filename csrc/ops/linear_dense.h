// linear_dense: y = x·Wᵀ + bias for few rows of x and a W that is not quantized, as of an output layer, on the CPU.
// Sums are float32; y is rounded once.
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct LinearDenseArgs {
    static constexpr int64_t max_rows = 4;  // of x

    TensorRef x;       // f32, f16 or bf16 [m, k]
    TensorRef weight;  // like x [n, k]
    TensorRef bias;    // like x [n], or undefined
    TensorRef y;       // like x [m, n], out
    int64_t k;

    int64_t m() const { return x.numel / k; }
    int64_t n() const { return weight.numel / k; }
};

inline void check(const LinearDenseArgs& a, Device device) {
    const char* op = "linear_dense";
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16});
    if (a.k < 1 || a.x.numel % a.k || a.m() > LinearDenseArgs::max_rows)
        bad_argument(op, "x", "up to " + std::to_string(LinearDenseArgs::max_rows) + " rows of k, at least 1",
                     std::to_string(a.x.numel) + " elements and a k of " + std::to_string(a.k));
    check_tensor(op, "weight", a.weight, device, {a.x.dtype});
    if (a.weight.numel % a.k)
        bad_argument(op, "weight", "rows of k, " + std::to_string(a.k), std::to_string(a.weight.numel) + " elements");
    if (a.bias.defined()) check_tensor(op, "bias", a.bias, device, {a.x.dtype}, a.n());
    check_tensor(op, "y", a.y, device, {a.x.dtype}, a.m() * a.n());
}

namespace cpu {
void linear_dense(const LinearDenseArgs& a, int threads);
}

}  // namespace pyqlora
