// rotary: y = x · cos + rotate_half(x) · sin for each head, rotate_half(x) = (-x₂, x₁) for the halves of x, and the way
// back, on the CPU. Both products and their sum are rounded to the dtype of x, as torch's are: the same bits.
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct RotaryArgs {
    TensorRef x;         // f32, f16 or bf16 [rows, heads, dim]
    TensorRef cos, sin;  // like x [positions, dim]; row i has position i % positions
    int64_t heads, dim;
    bool backward;  // x is the gradient of y, and y that of x
    TensorRef y;    // like x, out
};

inline void check(const RotaryArgs& a, Device device) {
    const char* op = "rotary";
    if (a.dim < 2 || a.dim % 2) bad_argument(op, "dim", "an even number from 2 up", std::to_string(a.dim));
    check_tensor(op, "cos", a.cos, device, {DType::f32, DType::f16, DType::bf16});
    if (!a.cos.numel || a.cos.numel % a.dim)
        bad_argument(op, "cos", "rows of " + std::to_string(a.dim), std::to_string(a.cos.numel) + " elements");
    check_tensor(op, "sin", a.sin, device, {a.cos.dtype}, a.cos.numel);
    check_tensor(op, "x", a.x, device, {a.cos.dtype});
    if (a.heads < 1 || a.x.numel % (a.cos.numel * a.heads))
        bad_argument(op, "x", "a multiple of " + std::to_string(a.heads) + " heads of cos",
                     std::to_string(a.x.numel) + " elements");
    check_tensor(op, "y", a.y, device, {a.cos.dtype}, a.x.numel);
}

namespace cpu {
void rotary(const RotaryArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
