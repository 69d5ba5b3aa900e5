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
    TensorRef logits;  // f32 [m, n], out; rows may have gaps between them
    int64_t k;

    int64_t m() const { return x.numel / k; }
    int64_t n() const { return weight.numel / k; }
};

struct LogitsBackwardArgs {
    TensorRef dlogits;  // f32 [m, n]; rows may have gaps between them
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

inline void check_logits(const char* op, const char* arg, const TensorRef& t, int64_t m, int64_t n, Device device) {
    check_rows(op, arg, t, device, {DType::f32});
    if (t.numel != m * n || (!t.contiguous && t.columns != n))
        bad_argument(op, arg, std::to_string(m) + " rows of " + std::to_string(n),
                     std::to_string(t.numel) + " elements");
}

inline void check(const LogitsArgs& a, Device device) {
    const char* op = "logits";
    check_output_layer(op, a.weight, a.k, device);
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_logits(op, "logits", a.logits, a.m(), a.n(), device);
}

inline void check(const LogitsBackwardArgs& a, Device device) {
    const char* op = "logits_backward";
    check_output_layer(op, a.weight, a.k, device);
    check_tensor(op, "dx", a.dx, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_logits(op, "dlogits", a.dlogits, a.m(), a.n(), device);
}

namespace cpu {
void logits(const LogitsArgs& a, int threads);
void logits_backward(const LogitsBackwardArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
