// lora_linear_4bit: y = x · dequant(W)ᵀ + bias + s·Bᵀ with s = scale · drop(x)·Aᵀ, on the CPU: lora_down and
// linear_4bit in one call, for the few rows whose products take less time than a second call would. (On a GPU each is a
// launch.) And its gradients: ds = scale · dy·B, dB = dyᵀ·s, dA = dsᵀ·drop(x), dx = dy · dequant(W) + drop(ds·A).
#pragma once
#include "ops/linear_4bit.h"
#include "ops/lora_linear.h"

namespace pyqlora {

struct LoraLinear4bitArgs {
    LoraDownArgs down;
    Linear4bitArgs linear;  // of the same x, k and s
    bool int16;             // as Linear4bitInt16Args
};

inline void check(const LoraLinear4bitArgs& a, Device device) {
    check(a.down, device);
    if (a.int16)
        check(Linear4bitInt16Args{a.linear}, device);
    else
        check(a.linear, device);
}

struct LoraLinear4bitBackwardArgs {
    LoraBackwardArgs of_b;          // ds and db from dy
    LoraBackwardArgs of_a;          // dA, or None, from x, transposed and with the dropout
    Linear4bitBackwardArgs linear;  // dx, or None, from dy
    TensorRef a;                    // f32, f16 or bf16 [rank, k]
};

inline void check(const LoraLinear4bitBackwardArgs& a, Device device) {
    const char* op = "lora_linear_4bit_backward";
    check(a.of_b, device);
    if (a.of_a.db.defined()) check(a.of_a, device);
    if (!a.linear.dx.defined()) return;
    check(a.linear, device);
    check_tensor(op, "a", a.a, device, {DType::f32, DType::f16, DType::bf16}, a.of_b.rank() * a.linear.k);
    check_dropout(op, a.of_a.dropout, device);
}

namespace cpu {
void lora_linear_4bit_backward(const LoraLinear4bitBackwardArgs& a, int threads);
void lora_linear_4bit(const LoraLinear4bitArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
