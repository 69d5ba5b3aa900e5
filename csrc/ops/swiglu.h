// swiglu: y = gate · sigmoid(gate) · up, element by element, and its gradients, on the CPU. Computed in float32 and
// rounded once.
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct SwigluArgs {
    TensorRef gate;  // f32, f16 or bf16
    TensorRef up;    // like gate
    TensorRef y;     // like gate, out
};

struct SwigluBackwardArgs {
    TensorRef gate, up, dy;
    TensorRef dgate, dup;  // like gate, out
};

inline void check(const SwigluArgs& a, Device device) {
    const char* op = "swiglu";
    check_tensor(op, "gate", a.gate, device, {DType::f32, DType::f16, DType::bf16});
    check_tensor(op, "up", a.up, device, {a.gate.dtype}, a.gate.numel);
    check_tensor(op, "y", a.y, device, {a.gate.dtype}, a.gate.numel);
}

inline void check(const SwigluBackwardArgs& a, Device device) {
    const char* op = "swiglu_backward";
    check_tensor(op, "gate", a.gate, device, {DType::f32, DType::f16, DType::bf16});
    for (const Named& t : {Named{"up", a.up}, {"dy", a.dy}, {"dgate", a.dgate}, {"dup", a.dup}})
        check_tensor(op, t.name, t.tensor, device, {a.gate.dtype}, a.gate.numel);
}

namespace cpu {
void swiglu(const SwigluArgs& a, int threads);
void swiglu_backward(const SwigluBackwardArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
