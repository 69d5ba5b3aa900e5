// Rows of matrices as operands of mma.m16n8k16, straight from memory: sums may be taken in any order, so a lane loads
// eight neighbouring elements of a row, and the two mma that follow use four each, the same four on both sides.
#pragma once
#include "core/tensor.h"
#include "core/vector.cuh"

namespace pyqlora::cuda {

#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__;
#else
constexpr int kArchitecture = 0;
#endif

template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 v = __floats2half2_rn(first, second);
        return reinterpret_cast<const uint32_t&>(v);
    } else {
        const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
        return reinterpret_cast<const uint32_t&>(v);
    }
}

// Eight elements as mma operands.
struct Eight {
    uint32_t word[4];
};

// Elements i .. i + 7 of a row; zeros from `length` on. vectors: the row is 16-byte aligned, length a multiple of 8.
template <class T>
__device__ __forceinline__ Eight load_eight(const T* row, int64_t i, int64_t length, bool vectors) {
    if (i >= length) return {};
    if (vectors) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + i));
        return {{v.x, v.y, v.z, v.w}};
    }
    Eight result;
#pragma unroll
    for (int e = 0; e < 8; e += 2)
        result.word[e / 2] =
            pack<T>(i + e < length ? to_float(row[i + e]) : 0.0f, i + e + 1 < length ? to_float(row[i + e + 1]) : 0.0f);
    return result;
}

// The same of another dtype, rounded to T.
template <class T, class From>
__device__ __forceinline__ Eight load_eight_as(const From* row, int64_t i, int64_t length, bool vectors) {
    if constexpr (std::is_same_v<T, From>) {
        return load_eight(row, i, length, vectors);
    } else {
        if (i >= length) return {};
        float v[kVector];
        if (vectors) {
            load_vector(row + i, v);
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e) v[e] = i + e < length ? to_float(row[i + e]) : 0.0f;
        }
        Eight result;
#pragma unroll
        for (int e = 0; e < 8; e += 2) result.word[e / 2] = pack<T>(v[e], v[e + 1]);
        return result;
    }
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;

// A row in a dtype known at run time, or none: zeros.
struct AnyRow {
    const char* data;
    DType dtype;

    __device__ __forceinline__ AnyRow(const void* matrix, DType dtype, int64_t first)
        : data(matrix ? static_cast<const char*>(matrix) + first * (dtype == DType::f32 ? 4 : 2) : nullptr),
          dtype(dtype) {}

    template <class T>
    __device__ __forceinline__ Eight load(int64_t i, int64_t length, bool vectors) const {
        if (!data) return {};
        if (dtype == DType::f32) return load_eight_as<T>(reinterpret_cast<const float*>(data), i, length, vectors);
        if (dtype == DType::f16) return load_eight_as<T>(reinterpret_cast<const __half*>(data), i, length, vectors);
        return load_eight_as<T>(reinterpret_cast<const __nv_bfloat16*>(data), i, length, vectors);
    }
    __device__ __forceinline__ float at(int64_t i) const {
        if (dtype == DType::f32) return reinterpret_cast<const float*>(data)[i];
        if (dtype == DType::f16) return to_float(reinterpret_cast<const __half*>(data)[i]);
        return to_float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
    }
};

}  // namespace pyqlora::cuda
