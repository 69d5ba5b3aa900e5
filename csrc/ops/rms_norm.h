// rms_norm: y = weight · round(x / √(mean(x²) + eps)) for each row and its gradient, on the CPU. Computed in float32;
// round() is to the dtype of x.
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct RmsNormArgs {
    TensorRef x;       // f32, f16 or bf16 [rows, dim]
    TensorRef weight;  // f32, f16 or bf16 [dim]
    double eps;
    TensorRef y;     // like x, or f32 [rows, dim], out
    TensorRef rstd;  // f32 [rows], out: 1 / √(mean(x²) + eps)

    int64_t dim() const { return weight.numel; }
};

struct RmsNormBackwardArgs {
    TensorRef x, weight, rstd;
    TensorRef dy;  // like y
    TensorRef dx;  // like x, out

    int64_t dim() const { return weight.numel; }
};

inline void check(const char* op, const TensorRef& x, const TensorRef& weight, const TensorRef& rstd, Device device) {
    check_tensor(op, "weight", weight, device, {DType::f32, DType::f16, DType::bf16});
    check_tensor(op, "x", x, device, {DType::f32, DType::f16, DType::bf16});
    if (!weight.numel || x.numel % weight.numel)
        bad_argument(op, "x", "rows as long as weight, " + std::to_string(weight.numel),
                     std::to_string(x.numel) + " elements");
    check_tensor(op, "rstd", rstd, device, {DType::f32}, x.numel / weight.numel);
}

inline void check(const RmsNormArgs& a, Device device) {
    const char* op = "rms_norm";
    check(op, a.x, a.weight, a.rstd, device);
    if (!(a.eps >= 0)) bad_argument(op, "eps", "a number from 0 up", std::to_string(a.eps));
    check_tensor(op, "y", a.y, device, {a.x.dtype, DType::f32}, a.x.numel);
}

inline void check(const RmsNormBackwardArgs& a, Device device) {
    const char* op = "rms_norm_backward";
    check(op, a.x, a.weight, a.rstd, device);
    check_tensor(op, "dy", a.dy, device, {a.x.dtype, DType::f32}, a.x.numel);
    check_tensor(op, "dx", a.dx, device, {a.x.dtype}, a.x.numel);
}

namespace cpu {
void rms_norm(const RmsNormArgs& a, int threads);
void rms_norm_backward(const RmsNormBackwardArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
