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

// The same on tensor cores, plus a low-rank update s·Bᵀ if there is one (lora_linear.h), with the sum over k split
// between thread blocks where one wave of them would not fill the GPU: each leaves its part in the workspace, and a
// second launch adds them in a fixed order.
struct Linear4bitMmaArgs {
    static constexpr int64_t max_rows = 64, step = 64, max_k = 1 << 24;

    Linear4bitArgs linear;
    TensorRef workspace;  // f32 [splits, m, n], or None for one split
    TensorRef s, b;       // x's dtype [m, rank] and f32, f16 or bf16 [n, rank], or None

    int64_t rank() const { return b.defined() ? b.numel / linear.n : 0; }
    int64_t splits() const { return workspace.defined() ? workspace.numel / linear.y.numel : 1; }
};

inline void check(const Linear4bitMmaArgs& a, Device device) {
    const char* op = "linear_4bit_mma";
    const Linear4bitArgs& l = a.linear;
    check(l, device);
    check_tensor(op, "x", l.x, device, {DType::f16, DType::bf16});
    if (l.m() < 1 || l.m() > a.max_rows)
        bad_argument(op, "x", "1 to " + std::to_string(a.max_rows) + " rows", std::to_string(l.m()));
    if (l.k % a.step || l.k > a.max_k)
        bad_argument(op, "shape",
                     "K a multiple of " + std::to_string(a.step) + " and at most " + std::to_string(a.max_k),
                     std::to_string(l.k));
    check_blocksize(op, l.blocksize, a.step);
    for (const Named& t : {Named{"x", l.x}, Named{"packed", l.packed}})
        if (reinterpret_cast<uintptr_t>(t.tensor.data) % 16)
            bad_argument(op, t.name, "a 16-byte aligned tensor", "a view at another address (call .clone())");
    if (a.b.defined()) {
        check_tensor(op, "b", a.b, device, {DType::f32, DType::f16, DType::bf16});
        if (a.b.numel == 0 || a.b.numel % l.n)
            bad_argument(op, "b", "a multiple of " + std::to_string(l.n) + " elements", std::to_string(a.b.numel));
        check_tensor(op, "s", a.s, device, {l.x.dtype}, l.m() * a.rank());
        check_same_device(op, {{"x", l.x}, {"s", a.s}, {"b", a.b}});
    }
    if (!a.workspace.defined()) return;
    check_tensor(op, "workspace", a.workspace, device, {DType::f32});
    if (a.workspace.numel == 0 || a.workspace.numel % l.y.numel)
        bad_argument(op, "workspace", "a multiple of " + std::to_string(l.y.numel) + " elements",
                     std::to_string(a.workspace.numel));
    check_same_device(op, {{"x", l.x}, {"workspace", a.workspace}});
}

namespace cpu {
void linear_4bit(const Linear4bitArgs& a, int threads);
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void linear_4bit(const Linear4bitArgs& a, void* stream);
void linear_4bit_mma(const Linear4bitMmaArgs& a, void* stream);
// How many splits of the sum over k give every multiprocessor work.
int64_t linear_4bit_mma_splits(int64_t m, int64_t n, int64_t k, int64_t multiprocessors);
}  // namespace cuda

}  // namespace pyqlora
