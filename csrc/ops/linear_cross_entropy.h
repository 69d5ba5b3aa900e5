// linear_cross_entropy: the two products of an output layer on the CPU, in float32 whatever the weight's dtype is.
//
//   logits     logits = x·Wᵀ             [m, k] -> [m, n]
//   backward   dx = dlogits·W            [m, n] -> [m, k]
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct LogitsArgs {
    TensorRef x;       // f32, f16 or bf16 [m, k]
    TensorRef weight;  // f32, f16 or bf16 [n, k]
    TensorRef logits;  // f32 [m, n], out
    int64_t k;

    int64_t m() const { return x.numel / k; }
    int64_t n() const { return weight.numel / k; }
};

struct LogitsBackwardArgs {
    TensorRef dlogits;  // f32 [m, n]
    TensorRef weight;   // f32, f16 or bf16 [n, k]
    TensorRef dx;       // f32, f16 or bf16 [m, k], out
    int64_t k;

    int64_t m() const { return dx.numel / k; }
    int64_t n() const { return weight.numel / k; }
};

inline void check_output_layer(const char* op, const TensorRef& weight, int64_t k, Device device) {
    if (k < 1) bad_argument(op, "k", "a positive number", std::to_string(k));
    check_tensor(op, "weight", weight, device, {DType::f32, DType::f16, DType::bf16});
    if (weight.numel % k) bad_argument(op, "weight", "rows of " + std::to_string(k), std::to_string(weight.numel));
}

inline void check(const LogitsArgs& a, Device device) {
    const char* op = "logits";
    check_output_layer(op, a.weight, a.k, device);
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_tensor(op, "logits", a.logits, device, {DType::f32}, a.m() * a.n());
}

inline void check(const LogitsBackwardArgs& a, Device device) {
    const char* op = "logits_backward";
    check_output_layer(op, a.weight, a.k, device);
    check_tensor(op, "dx", a.dx, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_tensor(op, "dlogits", a.dlogits, device, {DType::f32}, a.m() * a.n());
}

namespace cpu {
void logits(const LogitsArgs& a, int threads);
void logits_backward(const LogitsBackwardArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
