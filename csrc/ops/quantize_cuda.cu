#include "core/dispatch.h"
#include "core/launch.h"
#include "core/vector.cuh"
#include "ops/quantize_cuda.cuh"

namespace pyqlora::cuda {
namespace {

// Quantizing: a CUDA block of 512 threads holds 4096 elements, so that blocks of any size lie whole inside it.
constexpr int kThreads = 512, kTile = kThreads * kVector;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kTiny = 1e-38f;  // bitsandbytes' smallest divisor

// Elements base .. base + 7, zeros from n on.
template <class T>
__device__ __forceinline__ void load_tail(const T* x, int64_t base, int64_t n, bool vectors, float (&v)[kVector]) {
    if (vectors && base + kVector <= n) return load_vector(x + base, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = base + i < n ? to_float(x[base + i]) : 0.0f;
}

// The largest of each quantization block's `key`s, given to all its threads. Called by all threads of the tile; holds
// one barrier, which also publishes whatever the caller wrote to shared memory before.
__device__ __forceinline__ uint32_t block_max(uint32_t key, int log2_blocksize) {
    PYQLORA_SHARED(uint32_t[kThreads / 32], warp_max);
    const int threads = (1 << log2_blocksize) / kVector, warp = threadIdx.x / 32;
    for (int lanes = 1; lanes < min(threads, 32); lanes *= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, lanes));
    if (threadIdx.x % 32 == 0) warp_max[warp] = key;
    __syncthreads();
    const int warps = threads / 32;  // 0: the block lies inside this warp
    for (int i = 0; i < warps; ++i) key = max(key, warp_max[(warp & ~(warps - 1)) + i]);
    return key;
}

// How many of the 15 ascending bounds are below x; 15 for NaN. `bounds`: Q's, in shared memory.
template <class Q>
__device__ __forceinline__ int rank16(const float* bounds, float x) {
    constexpr float middle = Q::bounds[7];
    int rank = x <= middle ? 0 : 8;
    rank += x <= bounds[rank + 3] ? 0 : 4;
    rank += x <= bounds[rank + 1] ? 0 : 2;
    return rank + (x <= bounds[rank] ? 0 : 1);
}

// The codes of a type in order of rank, a nibble each.
template <class Q>
constexpr uint64_t code_nibbles() {
    uint64_t nibbles = 0;
    for (int rank = 0; rank < 16; ++rank) nibbles |= static_cast<uint64_t>(Q::order[rank]) << 4 * rank;
    return nibbles;
}
template <class Q>
constexpr uint64_t kCodes = code_nibbles<Q>();
constexpr uint64_t kIdentity = 0xfedcba9876543210u;

template <class T, class Q>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed, float* __restrict__ absmax, int64_t n,
                         int log2_blocksize, bool vectors, const __grid_constant__ Table16 table) {
    PYQLORA_SHARED(float[16], bounds);
    if (threadIdx.x < 16) bounds[threadIdx.x] = table.at[threadIdx.x];
    const int64_t base = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kVector;
    float v[kVector];
    load_tail(x, base, n, vectors, v);
    // As integers, magnitudes sort like floats, with infinity and then NaN on top: NaN spreads over its block.
    uint32_t key = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) key = max(key, __float_as_uint(v[i]) & 0x7fffffffu);
    key = block_max(key, log2_blocksize);
    if (base >= n) return;

    // bitsandbytes' arithmetic: a full block is multiplied by the reciprocal of its absmax, a short last one divided.
    const int64_t block = base >> log2_blocksize;
    const bool full = (block + 1) << log2_blocksize <= n;
    const float divisor = __uint_as_float(max(key, __float_as_uint(kTiny)));
    const float factor = __fdiv_rn(1.0f, divisor);
    if (base == block << log2_blocksize) absmax[block] = full ? __uint_as_float(key) : divisor;
    if (full) {
#pragma unroll
        for (float& value : v) value = __fmul_rn(value, factor);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = base + i < n ? __fdiv_rn(v[i], divisor) : 0.0f;
    }
    uint32_t word = 0;  // element 0 in the high nibble of the lowest byte
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        uint32_t code = rank16<Q>(bounds, v[i]);
        if constexpr (kCodes<Q> != kIdentity) code = kCodes<Q> >> 4 * code & 15;
        word |= code << 4 * (i ^ 1);
    }
    if (vectors && base + kVector <= n) {
        *reinterpret_cast<uint32_t*>(packed + base / 2) = word;
    } else {
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
            if (base + i < n) packed[(base + i) / 2] = static_cast<uint8_t>(word >> 4 * i);
        }
    }
}

// The 8-bit code of x (already divided by absmax) as bitsandbytes' CPU kernel finds it: x is rounded to one of 65536
// evenly spaced points of [-1, 1], and that point gets the number of midpoints between neighbouring codes below it.
__device__ __forceinline__ uint32_t rank256(const float* midpoints, float x) {
    const float unit = __fmul_rn(__fadd_rn(fminf(fmaxf(x, -1.0f), 1.0f), 1.0f), 0.5f);  // NaN: 0
    const int point = static_cast<int>(__fmaf_rn(unit, 65535.0f, 0.5f));
    const float value = __fadd_rn(__fdiv_rn(static_cast<float>(2 * point), 65535.0f), -1.0f);
    uint32_t rank = 0;
#pragma unroll
    for (int half = 128; half; half /= 2) rank += midpoints[rank + half - 1] < value ? half : 0;
    return rank;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_blockwise_kernel(const T* __restrict__ x, const float* __restrict__ code, uint8_t* __restrict__ q,
                              float* __restrict__ absmax, int64_t n, int log2_blocksize, bool vectors) {
    PYQLORA_SHARED(float[255], midpoints);
    if (threadIdx.x < 255)
        midpoints[threadIdx.x] = __fmul_rn(__fadd_rn(code[threadIdx.x], code[threadIdx.x + 1]), 0.5f);
    const int64_t base = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kVector;
    float v[kVector];
    load_tail(x, base, n, vectors, v);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, fabsf(v[i]));  // skips NaN
    largest = __uint_as_float(block_max(__float_as_uint(largest), log2_blocksize));
    if (base >= n) return;

    const int64_t block = base >> log2_blocksize;
    if (base == block << log2_blocksize) absmax[block] = largest;
    const float factor = __fdiv_rn(1.0f, largest);
    uint2 word{};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const uint32_t rank = largest > 0.0f ? rank256(midpoints, __fmul_rn(v[i], factor)) : 0;
        (i < 4 ? word.x : word.y) |= rank << 8 * (i % 4);
    }
    if (vectors && base + kVector <= n) {
        *reinterpret_cast<uint2*>(q + base) = word;
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (base + i < n) q[base + i] = static_cast<uint8_t>((i < 4 ? word.x : word.y) >> 8 * (i % 4));
        }
    }
}

// Decoding: 256 threads take `kSteps` vectors each, which one table in shared memory serves. A thread's loads all come
// first below; ptxas moves a vector's down to where the one before it is stored.
constexpr int kDecodeThreads = 256, kSteps = 4, kDecodeStep = kDecodeThreads * kVector,
              kDecodeVectors = kDecodeThreads * kSteps, kDecodeTile = kDecodeStep * kSteps;

// Decodes this thread's vectors of a tile, the first of them at `element`, and hands over each: store(v).
template <class Store>
__device__ __forceinline__ void decode_tile(const uint8_t* packed, const DeviceScales& scales, const float* values,
                                            int64_t element, int log2_blocksize, Store store) {
    uint32_t word[kSteps];
    DeviceScales::Stored stored[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s, element += kDecodeStep) {
        word[s] = load_streaming(reinterpret_cast<const uint32_t*>(packed + element / 2));
        stored[s] = scales.load(element >> log2_blocksize);
    }
    const float offset = scales.codes ? __ldg(scales.offset) : 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const float scale = scales.decode(stored[s], scales.nested_code, offset);
        float v[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(values[word[s] >> 4 * (i ^ 1) & 15], scale);
        store(v);
    }
}

// All in one row, from 16-byte boundaries on; first: a multiple of eight.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    dequantize_4bit_kernel(const uint8_t* __restrict__ packed, DeviceScales scales, T* __restrict__ out, int64_t numel,
                           int64_t first, int log2_blocksize, const __grid_constant__ Table16 table) {
    PYQLORA_SHARED(float[16], values);
    if (threadIdx.x < 16) values[threadIdx.x] = table.at[threadIdx.x];
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeTile;
    if (tile + kDecodeTile <= numel) {
        T* to = out + tile + threadIdx.x * kVector;
        decode_tile(packed, scales, values, first + tile + threadIdx.x * kVector, log2_blocksize,
                    [&](const float (&v)[kVector]) { store_vector(to, v), to += kDecodeStep; });
        return;
    }
#pragma unroll 1
    for (int64_t i = tile + threadIdx.x; i < numel; i += kDecodeThreads) {
        const int64_t element = first + i;
        const uint32_t code = packed[element / 2] >> (element % 2 ? 0 : 4) & 15;
        out[i] = from_float<T>(__fmul_rn(values[code], scales[element >> log2_blocksize]));
    }
}

// Rows of vectors that begin at 16-byte boundaries, so that a row's first and last may lie partly outside of it.
struct RowVectors : Rows {
    int64_t vectors;                  // of a row
    int64_t step_rows, step_vectors;  // from a thread's vector to its next
    bool whole;                       // each vector is eight elements of its row, and their codes are one word
};

// How many elements lie between the last 16-byte boundary and p.
template <class T>
__host__ __device__ __forceinline__ int lead(const T* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// What the other kernel leaves: gaps between rows, and beginnings anywhere.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    dequantize_4bit_rows_kernel(const uint8_t* __restrict__ packed, DeviceScales scales, T* __restrict__ out,
                                RowVectors rows, int64_t first, int log2_blocksize,
                                const __grid_constant__ Table16 table) {
    PYQLORA_SHARED(float[16], values);
    if (threadIdx.x < 16) values[threadIdx.x] = table.at[threadIdx.x];
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeVectors, index = tile + threadIdx.x;
    int64_t row = index / rows.vectors, vector = index - row * rows.vectors;
    const auto step = [&] {
        row += rows.step_rows, vector += rows.step_vectors;
        if (vector >= rows.vectors) vector -= rows.vectors, ++row;
    };
    if (rows.whole && tile + kDecodeVectors <= rows.count * rows.vectors) {
        decode_tile(packed, scales, values, first + index * kVector, log2_blocksize, [&](const float (&v)[kVector]) {
            store_vector(out + row * rows.stride + vector * kVector, v);
            step();
        });
        return;
    }
#pragma unroll 1
    for (int s = 0; s < kSteps && row < rows.count; ++s, step()) {
        T* const to = out + row * rows.stride;
        const int64_t column = vector * kVector - lead(to), element = first + row * rows.columns + column;
        const int begin = column < 0 ? -column : 0, end = min(rows.columns - column, int64_t{kVector});
        if (begin >= end) continue;
        // The vector's last element may lie in the next block.
        const int64_t block = (element + begin) >> log2_blocksize, last = (element + end - 1) >> log2_blocksize;
        const int left = static_cast<int>((last << log2_blocksize) - element), odd = element & 1;
        const float scale = scales[block], next = scales[last];
        const uint8_t* const bytes = packed + (element >> 1);
        float v[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const int at = min(max(i, begin), end - 1) + odd;  // without branches the loads do not wait for each other
            v[i] = __fmul_rn(values[bytes[at >> 1] >> (at & 1 ? 0 : 4) & 15], i < left ? scale : next);
        }
        if (end - begin == kVector) {
            store_vector(to + column, v);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (i >= begin && i < end) to[column + i] = from_float<T>(v[i]);
            }
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    dequantize_blockwise_kernel(const uint8_t* __restrict__ q, const float* __restrict__ code,
                                const float* __restrict__ absmax, T* __restrict__ out, int64_t n, int log2_blocksize,
                                bool vectors) {
    PYQLORA_SHARED(float[256], table);
    table[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeStep, base = tile + threadIdx.x * kVector;
    if (vectors && base + kVector <= n) {
        const uint2 word = __ldg(reinterpret_cast<const uint2*>(q + base));
        const float scale = __ldg(absmax + (base >> log2_blocksize));
        float v[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            v[i] = __fmul_rn(table[(i < 4 ? word.x : word.y) >> 8 * (i % 4) & 255], scale);
        store_vector(out + base, v);
        return;
    }
#pragma unroll 1
    for (int64_t i = base; i < min(base + kVector, n); ++i)
        out[i] = from_float<T>(__fmul_rn(table[q[i]], absmax[i >> log2_blocksize]));
}

}  // namespace

void quantize_4bit(const Quantize4bitArgs& a, void* stream) {
    const bool vectors = aligned(a.x.data, 16) && aligned(a.packed.data, 4);
    dispatch_float<__half, __nv_bfloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            using Q = decltype(quant);
            launch("quantize_4bit", a.x, stream, {ceil_div(a.x.numel, kTile), kThreads}, quantize_4bit_kernel<T, Q>,
                   a.x.as<T>(), a.packed.as<uint8_t>(), a.absmax.as<float>(), a.x.numel, log2(a.blocksize), vectors,
                   table16(Q::bounds));
        });
    });
}

void dequantize_4bit(const Dequantize4bitArgs& a, void* stream) {
    if (a.out.numel == 0) return;
    const DeviceScales scales(a.scales);
    const Table16 table = a.type == QuantType::nf4 ? table16(Nf4::values) : table16(Fp4::values);
    const bool words = a.first % kVector == 0 && aligned(a.packed.data, 4);
    dispatch_float<__half, __nv_bfloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const uint8_t* packed = a.packed.as<uint8_t>();
        T* out = a.out.as<T>();
        const auto launch_one = [&](int64_t vectors, auto kernel, auto where) {
            launch("dequantize_4bit", a.out, stream, {ceil_div(vectors, kDecodeVectors), kDecodeThreads}, kernel,
                   packed, scales, out, where, a.first, log2(a.blocksize), table);
        };
        if (words && lead(out) == 0 && a.out.contiguous)
            return launch_one(ceil_div(a.out.numel, kVector), dequantize_4bit_kernel<T>, a.out.numel);
        constexpr int boundary = 16 / sizeof(T);
        const Rows rows = a.out.rows();
        const bool alike = rows.count == 1 || rows.stride % boundary == 0;  // rows have one lead
        const int64_t vectors = ceil_div(rows.columns + (alike ? lead(out) : boundary - 1), kVector);
        launch_one(rows.count * vectors, dequantize_4bit_rows_kernel<T>,
                   RowVectors{rows, vectors, kDecodeThreads / vectors, kDecodeThreads % vectors,
                              words && alike && lead(out) == 0 && rows.columns % kVector == 0});
    });
}

void quantize_blockwise(const QuantizeBlockwiseArgs& a, void* stream) {
    check_blocksize("quantize_blockwise", a.blocksize, 64);  // one thread block holds whole quantization blocks
    const bool vectors = aligned(a.x.data, 16) && aligned(a.q.data, 8);
    dispatch_float<__half, __nv_bfloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch("quantize_blockwise", a.x, stream, {ceil_div(a.x.numel, kTile), kThreads}, quantize_blockwise_kernel<T>,
               a.x.as<T>(), a.code.as<float>(), a.q.as<uint8_t>(), a.absmax.as<float>(), a.x.numel, log2(a.blocksize),
               vectors);
    });
}

void dequantize_blockwise(const DequantizeBlockwiseArgs& a, void* stream) {
    const bool vectors = aligned(a.q.data, 8) && aligned(a.out.data, 16);
    dispatch_float<__half, __nv_bfloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch("dequantize_blockwise", a.out, stream, {ceil_div(a.q.numel, kDecodeStep), kDecodeThreads},
               dequantize_blockwise_kernel<T>, a.q.as<uint8_t>(), a.code.as<float>(), a.absmax.as<float>(),
               a.out.as<T>(), a.q.numel, log2(a.blocksize), vectors);
    });
}

}  // namespace pyqlora::cuda
