// linear_4bit without tensor cores: any dtype, any shape. A warp makes one column of y (one row of W) for up to 8 rows
// of x; it decodes each weight once, to float32.
#include "core/dispatch.h"
#include "core/launch.h"
#include "ops/linear_4bit_cuda.cuh"

namespace pyqlora::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// The codes of elements e .. e + 7 of `bytes` packed bytes; e is a multiple of 8.
__device__ __forceinline__ uint32_t load_codes(const uint8_t* packed, int64_t e, int64_t bytes, bool vectors) {
    if (vectors) return load_streaming(reinterpret_cast<const uint32_t*>(packed + e / 2));
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (e / 2 + i < bytes) word |= static_cast<uint32_t>(__ldg(packed + e / 2 + i)) << 8 * i;
    }
    return word;
}

// vectors: k is a multiple of 8 and everything is aligned. Else eight weights may reach into a neighbouring row of W.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    linear_4bit_kernel(const T* __restrict__ x, const uint8_t* __restrict__ packed, DeviceScales scales,
                       DeviceBias bias, T* __restrict__ y, int64_t m, int64_t n, int64_t k, int log2_blocksize,
                       unsigned x_tiles, bool vectors, const __grid_constant__ Table16 table) {
    PYQLORA_SHARED(float[16], values);
    if (threadIdx.x < 16) values[threadIdx.x] = table.at[threadIdx.x];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int64_t column = static_cast<int64_t>(blockIdx.x / x_tiles) * kWarps + threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x % x_tiles) * kRows;
    if (column >= n) return;

    const T* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = x + min(first + r, m - 1) * k;  // past the last row: that one again
    float sum[kRows] = {};
    const int64_t begin = column * k, end = begin + k;
    for (int64_t e = begin / kVector * kVector + lane * kVector; e < end; e += 32 * kVector) {
        const uint32_t codes = load_codes(packed, e, (n * k + 1) / 2, vectors);
        const float scale = scales[e >> log2_blocksize];
        float part[kRows] = {};
        if (vectors) {
            float w[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) w[i] = values[codes >> 4 * (i ^ 1) & 15];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float v[kVector];
                load_vector(rows[r] + (e - begin), v);
#pragma unroll
                for (int i = 0; i < kVector; ++i) part[r] = fmaf(w[i], v[i], part[r]);
            }
        } else {
            for (int i = 0; i < kVector; ++i) {
                if (e + i < begin || e + i >= end) continue;
                const float w = values[codes >> 4 * (i ^ 1) & 15];
#pragma unroll
                for (int r = 0; r < kRows; ++r) part[r] = fmaf(w, to_float(rows[r][e + i - begin]), part[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = fmaf(scale, part[r], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], lanes);
        if (lane == 0 && first + r < m) y[(first + r) * n + column] = from_float<T>(sum[r] + bias[column]);
    }
}

template <class T, int kRows>
void launch_rows(const Linear4bitArgs& a, void* stream, const Table16& table) {
    const bool vectors = a.k % kVector == 0 && aligned(a.packed.data, 4) && aligned(a.x.data, 16);
    const int64_t x_tiles = ceil_div(a.m(), kRows);
    launch("linear_4bit", a.x, stream, {x_tiles * ceil_div(a.n, kWarps), kThreads}, linear_4bit_kernel<T, kRows>,
           a.x.as<T>(), a.packed.as<uint8_t>(), DeviceScales(a.scales), DeviceBias(a.bias), a.y.as<T>(), a.m(), a.n,
           a.k, log2(a.blocksize), static_cast<unsigned>(x_tiles), vectors, table);
}

}  // namespace

void linear_4bit(const Linear4bitArgs& a, void* stream) {
    dispatch_float<__half, __nv_bfloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            const Table16 table = table16(decltype(quant)::values);
            if (a.m() <= 1) return launch_rows<T, 1>(a, stream, table);
            if (a.m() <= 2) return launch_rows<T, 2>(a, stream, table);
            if (a.m() <= 4) return launch_rows<T, 4>(a, stream, table);
            return launch_rows<T, 8>(a, stream, table);
        });
    });
}

}  // namespace pyqlora::cuda
