// attention: softmax(scale · q·kᵀ + mask)·v and its gradients on the CPU, in float32 whatever the dtype of q, k and v.
// Tensors are [batch, length, heads, dim]; heads / kv_heads heads of q share one of k and v.
#pragma once
#include "core/tensor.h"

namespace pyqlora {

struct AttentionSizes {
    int64_t batch, queries, keys, heads, kv_heads, dim, value_dim;
    int64_t mask_batch, mask_heads;  // of the mask: all, or 1 for one that serves all
};

struct AttentionInputs {
    AttentionSizes sizes;
    TensorRef q;     // f32, f16 or bf16 [batch, queries, heads, dim]
    TensorRef k;     // like q [batch, keys, kv_heads, dim]
    TensorRef v;     // like q [batch, keys, kv_heads, value_dim]
    TensorRef mask;  // may be undefined; u8 (1: seen) or f32 (added) [mask_batch, mask_heads, queries, keys]
    bool causal;     // query i sees keys 0 to i
    double scale;
};

struct AttentionArgs {
    AttentionInputs in;
    TensorRef out;  // like q [batch, queries, heads, value_dim], out; 0 for a query that sees no key
    TensorRef lse;  // f32 [batch, heads, queries], out: the logarithm of the sum of exponentials, -inf for none
};

struct AttentionBackwardArgs {
    AttentionInputs in;
    TensorRef lse, dout;
    TensorRef dq, dk, dv;  // like q, k and v, out
};

inline void check(const char* op, const AttentionInputs& a, Device device) {
    const AttentionSizes& s = a.sizes;
    for (const int64_t size : {s.batch, s.queries, s.keys, s.heads, s.kv_heads, s.dim, s.value_dim})
        if (size < 1) bad_argument(op, "sizes", "positive numbers", std::to_string(size));
    if (s.heads % s.kv_heads)
        bad_argument(op, "heads", "a multiple of " + std::to_string(s.kv_heads), std::to_string(s.heads));
    check_tensor(op, "q", a.q, device, {DType::f32, DType::f16, DType::bf16}, s.batch * s.queries * s.heads * s.dim);
    check_tensor(op, "k", a.k, device, {a.q.dtype}, s.batch * s.keys * s.kv_heads * s.dim);
    check_tensor(op, "v", a.v, device, {a.q.dtype}, s.batch * s.keys * s.kv_heads * s.value_dim);
    if (!a.mask.defined()) return;
    if ((s.mask_batch != s.batch && s.mask_batch != 1) || (s.mask_heads != s.heads && s.mask_heads != 1))
        bad_argument(op, "mask",
                     "[" + std::to_string(s.batch) + " or 1, " + std::to_string(s.heads) + " or 1, queries, keys]",
                     "[" + std::to_string(s.mask_batch) + ", " + std::to_string(s.mask_heads) + ", ...]");
    check_tensor(op, "mask", a.mask, device, {DType::u8, DType::f32}, s.mask_batch * s.mask_heads * s.queries * s.keys);
}

inline void check(const AttentionArgs& a, Device device) {
    const char* op = "attention";
    const AttentionSizes& s = a.in.sizes;
    check(op, a.in, device);
    check_tensor(op, "out", a.out, device, {a.in.q.dtype}, s.batch * s.queries * s.heads * s.value_dim);
    check_tensor(op, "lse", a.lse, device, {DType::f32}, s.batch * s.heads * s.queries);
}

inline void check(const AttentionBackwardArgs& a, Device device) {
    const char* op = "attention_backward";
    const AttentionSizes& s = a.in.sizes;
    const int64_t values = s.batch * s.queries * s.heads * s.value_dim;
    check(op, a.in, device);
    check_tensor(op, "lse", a.lse, device, {DType::f32}, s.batch * s.heads * s.queries);
    check_tensor(op, "dout", a.dout, device, {a.in.q.dtype}, values);
    check_tensor(op, "dq", a.dq, device, {a.in.q.dtype}, a.in.q.numel);
    check_tensor(op, "dk", a.dk, device, {a.in.q.dtype}, a.in.k.numel);
    check_tensor(op, "dv", a.dv, device, {a.in.q.dtype}, a.in.v.numel);
}

namespace cpu {
void attention(const AttentionArgs& a, int threads);
void attention_backward(const AttentionBackwardArgs& a, int threads);
}  // namespace cpu

}  // namespace pyqlora
