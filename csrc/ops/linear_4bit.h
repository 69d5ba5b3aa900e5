// linear_4bit: y = x · dequant(W)ᵀ + bias, on the CPU plus a low-rank update s·Bᵀ if there is one (lora_linear.h), and
// dx = dy · dequant(W). W is never held decoded. (On a GPU this is the kernel for any shape and few rows of x; for many
// the caller decodes W and leaves the product to a library.)
#pragma once
#include "core/cpu_features.h"
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
    TensorRef s, b;  // [m, rank], f32 on the CPU and x's dtype on a GPU, and f32, f16 or bf16 [n, rank], or None

    int64_t m() const { return k ? x.numel / k : 0; }
    int64_t rank() const { return b.defined() ? b.numel / n : 0; }
};

// On the CPU.
struct Linear4bitBackwardArgs {
    TensorRef dy;      // f32, f16 or bf16 [m, n]
    TensorRef packed;  // u8 [(n * k + 1) / 2]
    Scales scales;
    TensorRef dx;  // dy's dtype [m, k], out
    int64_t n, k;  // the shape of W
    int64_t blocksize;
    QuantType type;

    int64_t m() const { return n ? dy.numel / n : 0; }
};

inline void check_weight(const char* op, const TensorRef& packed, const Scales& scales, int64_t n, int64_t k,
                         int64_t blocksize, Device device) {
    if (n < 1 || k < 1)
        bad_argument(op, "shape", "[N, K], both positive", "[" + std::to_string(n) + ", " + std::to_string(k) + "]");
    check_blocksize(op, blocksize, 32);
    check_tensor(op, "packed", packed, device, {DType::u8}, (n * k + 1) / 2);
    check_scales(op, scales, device, ceil_div(n * k, blocksize));
}

inline void check(const Linear4bitArgs& a, Device device) {
    const char* op = "linear_4bit";
    check_weight(op, a.packed, a.scales, a.n, a.k, a.blocksize, device);
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.k);
    check_tensor(op, "y", a.y, device, {a.x.dtype}, a.m() * a.n);
    if (a.bias.defined()) check_tensor(op, "bias", a.bias, device, {DType::f32, DType::f16, DType::bf16}, a.n);
    if (a.b.defined()) {
        check_tensor(op, "b", a.b, device, {DType::f32, DType::f16, DType::bf16});
        if (a.b.numel == 0 || a.b.numel % a.n)
            bad_argument(op, "b", "a multiple of " + std::to_string(a.n) + " elements", std::to_string(a.b.numel));
        check_tensor(op, "s", a.s, device, {DType::f32, a.x.dtype}, a.m() * a.rank());
    }
    check_same_device(op, {{"x", a.x},
                           {"packed", a.packed},
                           {"absmax", a.scales.absmax},
                           {"nested_absmax", a.scales.nested_absmax},
                           {"nested_code", a.scales.nested_code},
                           {"offset", a.scales.offset},
                           {"bias", a.bias},
                           {"y", a.y},
                           {"s", a.s},
                           {"b", a.b}});
}

inline void check(const Linear4bitBackwardArgs& a, Device device) {
    const char* op = "linear_4bit";
    check_weight(op, a.packed, a.scales, a.n, a.k, a.blocksize, device);
    check_tensor(op, "dy", a.dy, device, {DType::f32, DType::f16, DType::bf16}, a.m() * a.n);
    check_tensor(op, "dx", a.dx, device, {a.dy.dtype}, a.m() * a.k);
}

// The same on tensor cores, with the update, and with the sum over k split between thread blocks where one wave of them
// would not fill the GPU: each leaves its part in the workspace, and a second launch adds them in a fixed order.
struct Linear4bitMmaArgs {
    static constexpr int64_t max_rows = 64, step = 64, max_k = 1 << 24;

    Linear4bitArgs linear;
    TensorRef workspace;  // f32 [splits, m, n], or None for one split

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
    if (l.b.defined()) check_tensor(op, "s", l.s, device, {l.x.dtype});
    if (!a.workspace.defined()) return;
    check_tensor(op, "workspace", a.workspace, device, {DType::f32});
    if (a.workspace.numel == 0 || a.workspace.numel % l.y.numel)
        bad_argument(op, "workspace", "a multiple of " + std::to_string(l.y.numel) + " elements",
                     std::to_string(a.workspace.numel));
    check_same_device(op, {{"x", l.x}, {"workspace", a.workspace}});
}

// One row of x, rounded to 16 bits: each 64 elements share a scale, the largest of them becoming 16383. The values of
// the 4-bit codes are rounded to multiples of 1/16384 of a block's absmax. The sums are exact within a block of 64.
struct Linear4bitInt16Args {
    Linear4bitArgs linear;
};

inline void check(const Linear4bitInt16Args& a, Device device) {
    const char* op = "linear_4bit_int16";
    const Linear4bitArgs& l = a.linear;
    check(l, device);
    if (l.m() != 1) bad_argument(op, "x", "one row", std::to_string(l.m()));
    if (l.k % l.blocksize) bad_argument(op, "shape", "K a multiple of the block size", std::to_string(l.k));
    if (cpu::active_isa() == cpu::Isa::scalar)
        throw std::runtime_error("linear_4bit_int16: the CPU kernels in use have no AVX2");
}

namespace cpu {
void linear_4bit(const Linear4bitArgs& a, int threads);
void linear_4bit_int16(const Linear4bitInt16Args& a, int threads);
void linear_4bit_backward(const Linear4bitBackwardArgs& a, int threads);
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void linear_4bit(const Linear4bitArgs& a, void* stream);
void linear_4bit_mma(const Linear4bitMmaArgs& a, void* stream);
// How many splits of the sum over k give every multiprocessor work.
int64_t linear_4bit_mma_splits(int64_t m, int64_t n, int64_t k, int64_t multiprocessors);
}  // namespace cuda

}  // namespace pyqlora
