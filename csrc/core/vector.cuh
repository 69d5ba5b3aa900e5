// Eight neighbouring elements as floats, moved by 16-byte accesses: the unit of work of one thread.
#pragma once
#include "core/ptx.cuh"

namespace pyqlora::cuda {

constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <class T>
struct alignas(16) Vector {
    T at[kVector];
};

// p: 16-byte aligned. read_only: nobody writes there while the kernel runs.
template <bool read_only = true, class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
    constexpr int words = sizeof(Vector<T>) / sizeof(uint4);
    union {
        uint4 word[words];
        Vector<T> vector;
    } u;
#pragma unroll
    for (int i = 0; i < words; ++i) {
        const uint4* const from = reinterpret_cast<const uint4*>(p) + i;
        u.word[i] = read_only ? __ldg(from) : *from;
    }
    return u.vector;
}

template <bool read_only = true, class T>
__device__ __forceinline__ void load_vector(const T* p, float (&v)[kVector]) {
    const Vector<T> loaded = load_vector<read_only>(p);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(loaded.at[i]);
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const float (&v)[kVector]) {
    constexpr int words = sizeof(Vector<T>) / sizeof(uint4);
    union {
        uint4 word[words];
        Vector<T> vector;
    } u;
#pragma unroll
    for (int i = 0; i < kVector; ++i) u.vector.at[i] = from_float<T>(v[i]);
#pragma unroll
    for (int i = 0; i < words; ++i) __stwb(reinterpret_cast<uint4*>(p) + i, u.word[i]);  // never taken apart by nvcc
}

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace pyqlora::cuda
