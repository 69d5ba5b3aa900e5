// quantize: float tensors to 4-bit and 8-bit codes by blocks, and back. One set of arguments and one check() serve the
// CPU and the CUDA kernels, which give the same bytes.
#pragma once
#include <cstdint>
#include <string>

#include "core/quant_types.h"
#include "core/tensor.h"

namespace pyqlora {

// absmax of a 4-bit tensor: float32, or uint8 codes under double quantization (then the nested_* are defined).
struct Scales {
    TensorRef absmax;         // f32 or u8 [blocks]
    TensorRef nested_absmax;  // f32 [ceil(blocks / nested_blocksize)]
    TensorRef nested_code;    // f32 [256]
    TensorRef offset;         // f32 [1]
    int64_t nested_blocksize = 256;

    bool nested() const { return nested_absmax.defined(); }
};

struct Quantize4bitArgs {
    TensorRef x;       // f32, f16 or bf16 [n]
    TensorRef packed;  // u8 [(n + 1) / 2], out
    TensorRef absmax;  // f32 [ceil(n / blocksize)], out
    int64_t blocksize;
    QuantType type;
};

// Decodes elements [first, first + out.numel) of a packed tensor of `numel` elements into rows, gaps between or not.
struct Dequantize4bitArgs {
    TensorRef packed;  // u8 [(numel + 1) / 2]
    Scales scales;
    TensorRef out;  // f32, f16 or bf16 [rows, columns], rows `stride` apart
    int64_t numel;
    int64_t first;
    int64_t blocksize;
    QuantType type;
};

// 8-bit codes: the index of the nearest of the 256 ascending values of `code`, after division by the block's absmax.
struct QuantizeBlockwiseArgs {
    TensorRef x;       // f32, f16 or bf16 [n]
    TensorRef code;    // f32 [256]
    TensorRef q;       // u8 [n], out
    TensorRef absmax;  // f32 [ceil(n / blocksize)], out
    int64_t blocksize;
};

struct DequantizeBlockwiseArgs {
    TensorRef q;       // u8 [n]
    TensorRef code;    // f32 [256]
    TensorRef absmax;  // f32 [ceil(n / blocksize)]
    TensorRef out;     // f32, f16 or bf16 [n]
    int64_t blocksize;
};

// A power of two from 32 (4-bit) or 64 (8-bit) to 4096, as in bitsandbytes; on the CPU 8-bit blocks may be longer.
constexpr int64_t kLargestCpuBlock = 1 << 20;

inline void check_blocksize(const char* op, int64_t blocksize, int64_t smallest, int64_t largest = 4096) {
    if (blocksize < smallest || blocksize > largest || (blocksize & (blocksize - 1)))
        bad_argument(op, "blocksize",
                     "a power of two from " + std::to_string(smallest) + " to " + std::to_string(largest),
                     std::to_string(blocksize));
}

inline void check_scales(const char* op, const Scales& s, Device device, int64_t blocks) {
    if (!s.nested()) return check_tensor(op, "absmax", s.absmax, device, {DType::f32}, blocks);
    check_tensor(op, "absmax", s.absmax, device, {DType::u8}, blocks);
    check_blocksize(op, s.nested_blocksize, 64);
    check_tensor(op, "nested_absmax", s.nested_absmax, device, {DType::f32}, ceil_div(blocks, s.nested_blocksize));
    check_tensor(op, "nested_code", s.nested_code, device, {DType::f32}, 256);
    check_tensor(op, "offset", s.offset, device, {DType::f32}, 1);
}

inline void check(const Quantize4bitArgs& a, Device device) {
    const char* op = "quantize_4bit";
    check_blocksize(op, a.blocksize, 32);
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16});
    check_tensor(op, "packed", a.packed, device, {DType::u8}, (a.x.numel + 1) / 2);
    check_tensor(op, "absmax", a.absmax, device, {DType::f32}, ceil_div(a.x.numel, a.blocksize));
    check_same_device(op, {{"x", a.x}, {"packed", a.packed}, {"absmax", a.absmax}});
}

inline void check(const Dequantize4bitArgs& a, Device device) {
    const char* op = "dequantize_4bit";
    check_blocksize(op, a.blocksize, 32);
    check_tensor(op, "packed", a.packed, device, {DType::u8}, (a.numel + 1) / 2);
    check_scales(op, a.scales, device, ceil_div(a.numel, a.blocksize));
    check_rows(op, "out", a.out, device, {DType::f32, DType::f16, DType::bf16});
    if (a.first < 0 || a.first + a.out.numel > a.numel)
        bad_argument(op, "first", "a window inside " + std::to_string(a.numel) + " elements",
                     "[" + std::to_string(a.first) + ", " + std::to_string(a.first + a.out.numel) + ")");
    check_same_device(op, {{"packed", a.packed},
                           {"absmax", a.scales.absmax},
                           {"nested_absmax", a.scales.nested_absmax},
                           {"nested_code", a.scales.nested_code},
                           {"offset", a.scales.offset},
                           {"out", a.out}});
}

inline void check(const QuantizeBlockwiseArgs& a, Device device) {
    const char* op = "quantize_blockwise";
    check_blocksize(op, a.blocksize, 64, kLargestCpuBlock);
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16});
    check_tensor(op, "code", a.code, device, {DType::f32}, 256);
    check_tensor(op, "q", a.q, device, {DType::u8}, a.x.numel);
    check_tensor(op, "absmax", a.absmax, device, {DType::f32}, ceil_div(a.x.numel, a.blocksize));
    check_same_device(op, {{"x", a.x}, {"code", a.code}, {"q", a.q}, {"absmax", a.absmax}});
}

inline void check(const DequantizeBlockwiseArgs& a, Device device) {
    const char* op = "dequantize_blockwise";
    check_blocksize(op, a.blocksize, 64, kLargestCpuBlock);
    check_tensor(op, "q", a.q, device, {DType::u8});
    check_tensor(op, "code", a.code, device, {DType::f32}, 256);
    check_tensor(op, "absmax", a.absmax, device, {DType::f32}, ceil_div(a.q.numel, a.blocksize));
    check_tensor(op, "out", a.out, device, {DType::f32, DType::f16, DType::bf16}, a.q.numel);
    check_same_device(op, {{"q", a.q}, {"code", a.code}, {"absmax", a.absmax}, {"out", a.out}});
}

namespace cpu {
void quantize_4bit(const Quantize4bitArgs& a, int threads);
void dequantize_4bit(const Dequantize4bitArgs& a, int threads);
void quantize_blockwise(const QuantizeBlockwiseArgs& a, int threads);
void dequantize_blockwise(const DequantizeBlockwiseArgs& a, int threads);
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void quantize_4bit(const Quantize4bitArgs& a, void* stream);
void dequantize_4bit(const Dequantize4bitArgs& a, void* stream);
void quantize_blockwise(const QuantizeBlockwiseArgs& a, void* stream);
void dequantize_blockwise(const DequantizeBlockwiseArgs& a, void* stream);
}  // namespace cuda

}  // namespace pyqlora
