// lora_linear_4bit: y = x · dequant(W)ᵀ + bias + s·Bᵀ with s = scale · drop(x)·Aᵀ, on the CPU: lora_down and
// linear_4bit in one call, for the few rows whose products take less time than a second call would. (On a GPU each is a
// launch.)
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

namespace cpu {
void lora_linear_4bit(const LoraLinear4bitArgs& a, int threads);
}

}  // namespace pyqlora
