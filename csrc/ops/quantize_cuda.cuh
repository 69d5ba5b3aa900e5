// What the CUDA kernels of other operations use of quantize: a type's table as a kernel argument, and a block's scale.
#pragma once
#include <cuda_runtime.h>

#include "ops/quantize.h"

namespace pyqlora::cuda {

inline int log2(int64_t power_of_two) { return __builtin_ctzll(power_of_two); }

// A 16-entry table as a kernel argument: it comes with the launch and is copied to shared memory.
struct Table16 {
    float at[16];
};
template <size_t N>
Table16 table16(const float (&values)[N]) {
    Table16 table{};
    for (size_t i = 0; i < N; ++i) table.at[i] = values[i];
    return table;
}

// Scales with the block sizes as shifts.
struct DeviceScales {
    const float* absmax;
    const uint8_t* codes;  // null: absmax is not quantized
    const float *nested_absmax, *nested_code, *offset;
    int log2_nested_blocksize;

    explicit DeviceScales(const Scales& s)
        : absmax(s.nested() ? nullptr : s.absmax.as<float>()),
          codes(s.nested() ? s.absmax.as<uint8_t>() : nullptr),
          nested_absmax(s.nested_absmax.as<float>()),
          nested_code(s.nested_code.as<float>()),
          offset(s.offset.as<float>()),
          log2_nested_blocksize(log2(s.nested_blocksize)) {}

    // What memory holds of a block's scale. Loading and decoding apart, a kernel can load long before it decodes.
    struct Stored {
        float absmax;  // of the block, or nested: of the block of codes
        uint32_t code;
    };
    __device__ __forceinline__ Stored load(int64_t block) const {
        if (!codes) return {__ldg(absmax + block), 0};
        return {__ldg(nested_absmax + (block >> log2_nested_blocksize)), __ldg(codes + block)};
    }
    // map, mean: nested_code and offset, from wherever the kernel keeps them.
    __device__ __forceinline__ float decode(Stored stored, const float* map, float mean) const {
        if (!codes) return stored.absmax;
        return __fadd_rn(__fmul_rn(map[stored.code], stored.absmax), mean);
    }
    __device__ __forceinline__ float operator[](int64_t block) const {
        const Stored stored = load(block);
        if (!codes) return stored.absmax;
        return __fadd_rn(__fmul_rn(__ldg(nested_code + stored.code), stored.absmax), __ldg(offset));
    }
};

}  // namespace pyqlora::cuda
