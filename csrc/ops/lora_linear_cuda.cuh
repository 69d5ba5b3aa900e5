// What the kernels of lora_linear share: dropout, and sums of parts.
#pragma once
#include "core/dispatch.h"
#include "core/launch.h"
#include "core/operands.cuh"
#include "ops/lora_linear.h"

namespace pyqlora::cuda {

constexpr int kLoraWarps = 8, kLoraThreads = 32 * kLoraWarps;

struct DeviceDropout {
    const int64_t* seed;
    uint32_t threshold;  // 0: none

    explicit DeviceDropout(const Dropout& d) : seed(d.seed.as<int64_t>()), threshold(d.threshold()) {}

    __device__ __forceinline__ uint64_t key() const { return threshold ? static_cast<uint64_t>(__ldg(seed)) : 0; }
    // Columns i .. i + 7 of a row, those that are dropped as zeros.
    __device__ __forceinline__ void apply(uint64_t key, int64_t row, int64_t i, Eight& v) const {
        if (!threshold) return;
        const uint32_t bits = kept(key, row, i / 8, threshold);
#pragma unroll
        for (int w = 0; w < 4; ++w)
            v.word[w] &= (bits >> 2 * w & 1 ? 0xffffu : 0u) | (bits >> 2 * w & 2 ? 0xffff0000u : 0u);
    }
    __device__ __forceinline__ void apply(uint64_t key, int64_t row, int64_t i, float (&v)[kVector]) const {
        if (!threshold) return;
        const uint32_t bits = kept(key, row, i / 8, threshold);
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = bits >> e & 1 ? v[e] : 0.0f;
    }
};

// out = the parts' sum in their order; parts [count, size].
template <class T>
__global__ void __launch_bounds__(kLoraThreads)
    lora_sum_kernel(const float* __restrict__ parts, T* __restrict__ out, int64_t size, int count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kLoraThreads + threadIdx.x;
    if (i >= size) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < count; ++part) sum += __ldg(parts + part * size + i);
    out[i] = from_float<T>(sum);
}

// The same transposed: parts [count, rows, columns], out [columns, rows]. A lane sums eight rows of a column, which are
// neighbours in out; the next lane has the next eight, where there are more, and the one after it the next column:
// whole sectors on both sides.
template <class T>
__global__ void __launch_bounds__(kLoraThreads)
    lora_sum_transposed_kernel(const float* __restrict__ parts, T* __restrict__ out, int rows, int64_t columns,
                               int count, int side, bool vectors) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kLoraThreads + threadIdx.x, column = unit / side % columns;
    const int64_t row0 = (unit / (side * columns) * side + unit % side) * kVector;
    if (row0 >= rows) return;
    float sum[kVector] = {};
#pragma unroll 2
    for (int part = 0; part < count; ++part) {
        const float* const from = parts + (part * rows + row0) * columns + column;
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] += row0 + e < rows ? __ldg(from + e * columns) : 0.0f;
    }
    T* const to = out + column * rows + row0;
    if (vectors) return store_vector(to, sum);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
        if (row0 + e < rows) to[e] = from_float<T>(sum[e]);
    }
}

template <class T>
void sum_parts(const char* op, const TensorRef& parts, const TensorRef& out, void* stream) {
    launch(op, out, stream, {ceil_div(out.numel, kLoraThreads), kLoraThreads}, lora_sum_kernel<T>, parts.as<float>(),
           out.as<T>(), out.numel, static_cast<int>(parts.numel / out.numel));
}

template <class T>
void sum_parts_transposed(const char* op, const TensorRef& parts, const TensorRef& out, int64_t columns, void* stream) {
    const int64_t rows = out.numel / columns, eights = ceil_div(rows, kVector), side = eights > 1 ? 2 : 1;
    launch(op, out, stream, {ceil_div(ceil_div(eights, side) * side * columns, kLoraThreads), kLoraThreads},
           lora_sum_transposed_kernel<T>, parts.as<float>(), out.as<T>(), static_cast<int>(rows), columns,
           static_cast<int>(parts.numel / out.numel), static_cast<int>(side),
           rows % kVector == 0 && aligned(out.data, 16));
}

// f(Tag<half>) or f(Tag<bfloat16>), which needs sm_80.
template <class F>
void dispatch_16bit(const char* op, const TensorRef& x, F f) {
    if (x.dtype == DType::f16) return f(Tag<__half>{});
    require_bf16_tensor_cores(op, x);
    f(Tag<__nv_bfloat16>{});
}

}  // namespace pyqlora::cuda
