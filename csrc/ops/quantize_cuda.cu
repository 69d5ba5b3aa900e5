#include <iterator>

#include "core/dispatch.h"
#include "core/launch.h"
#include "core/vector.cuh"
#include "ops/quantize_cuda.cuh"

namespace pyqlora::cuda {
namespace {

// Quantizing: 512 threads hold a tile of 4096 elements, so that blocks of any size lie whole inside it.
constexpr int kThreads = 512, kTile = kThreads * kVector;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kTiny = 1e-38f;  // bitsandbytes' smallest divisor
constexpr uint32_t kInfinity = 0x7f800000u;

// Elements base .. base + 7, zeros from n on.
template <class T>
__device__ __forceinline__ Vector<T> load_tail(const T* x, int64_t base, int64_t n, bool vectors) {
    if (vectors && base + kVector <= n) return load_vector(x + base);
    Vector<T> tail{};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (base + i < n) tail.at[i] = x[base + i];
    }
    return tail;
}

// The largest of each quantization block's `key`s, given to all its threads; a key per tile. Called by all threads of
// the CUDA block; blocks of more than a warp's elements take a barrier.
template <int kTiles>
__device__ __forceinline__ void block_max(uint32_t (&key)[kTiles], int log2_blocksize) {
    PYQLORA_SHARED(uint32_t[kTiles * kThreads / 32], warp_max);
    const int threads = (1 << log2_blocksize) / kVector, warp = threadIdx.x / 32;
    for (int lanes = 1; lanes < min(threads, 32); lanes *= 2) {
#pragma unroll
        for (uint32_t& k : key) k = max(k, __shfl_xor_sync(kAllLanes, k, lanes));
    }
    const int warps = threads / 32;
    if (warps <= 1) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (threadIdx.x % 32 == 0) warp_max[tile * (kThreads / 32) + warp] = key[tile];
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t* const first = warp_max + tile * (kThreads / 32) + (warp & ~(warps - 1));
        for (int i = 0; i < warps; ++i) key[tile] = max(key[tile], first[i]);
    }
}

// To encode x without a search: a curve numbers a type's bounds, so that the whole number next to it at x is that of
// the one bound to compare x with. Shared memory holds them from 1 on; 0 and the number after the last are of x beyond
// all of them. That is 17 words at most, of which no two share a bank.
template <class Q>
constexpr int kBounds = std::size(Q::gpu_bounds);
template <class Q>
constexpr bool kSigned = Q::gpu_bounds[0] < 0;  // else they bound the magnitude, and bit 3 of a code is the sign
template <class Q>
constexpr int count_negative() {
    int count = 0;
    for (float bound : Q::gpu_bounds) count += bound < 0;
    return count;
}
template <class Q>
constexpr int kOrigin = 1 + count_negative<Q>();  // the curve's number at 0

// The number of x's bound. Where it changes either will do: neither bound is near.
template <class Q>
__device__ __forceinline__ uint32_t number_of(float x) {
    constexpr float quarters = 2097152.0f;  // 2^21, above which a float's last bit counts quarters
    const float sum = __fmaf_rn(x, __fsub_rn(Q::gpu_curve, fabsf(x)), quarters + kOrigin<Q> / 4.0f);
    return __float_as_uint(sum) - __float_as_uint(quarters);
}

// The codes of ranks, a nibble each.
template <class Q>
__host__ __device__ constexpr uint32_t codes_of(uint32_t ranks) {
    return kSigned<Q> ? ranks : ranks ^ (ranks & 0x22222222u) << 1;
}

// Whether the curve gives each bound its own number, with room for rounding, and stays within them from -1 to 1; and
// whether codes_of is right.
template <class Q>
constexpr bool curve_numbers_bounds() {
    bool right = Q::gpu_curve >= 2;  // it rises
    for (int i = 0; i < kBounds<Q> + 2; ++i) {
        const double x = i == 0 ? (kSigned<Q> ? -1 : 0) : i <= kBounds<Q> ? Q::gpu_bounds[i - 1] : 1;
        const double number = 4 * x * (Q::gpu_curve - (x < 0 ? -x : x)) + kOrigin<Q>;
        const bool end = i == 0 || i > kBounds<Q>;
        right = right && (end ? number > -0.49 && number < kBounds<Q> + 1.49 : number > i - 0.49 && number < i + 0.49);
    }
    for (uint32_t rank = 0; rank <= kBounds<Q>; ++rank) right = right && codes_of<Q>(rank) == Q::gpu_order[rank];
    return right;
}
static_assert(curve_numbers_bounds<Nf4>() && curve_numbers_bounds<Fp4>());

template <class Q>
__device__ __forceinline__ void fill_bounds(float* bounds, int number, const Table16& table) {
    const float infinity = __uint_as_float(kInfinity);
    bounds[number] = number == 0 ? -infinity : number <= kBounds<Q> ? table.at[number - 1] : infinity;
}

// The codes of eight elements from -1 to 1, of which the first is the high nibble of the lowest byte.
template <class Q>
__device__ __forceinline__ uint32_t encode(const float* bounds, const float (&v)[kVector]) {
    uint32_t ranks = 0u - 0x11111111u;  // bounds count from 1, ranks from 0
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const float x = kSigned<Q> ? v[i] : fabsf(v[i]);
        const uint32_t number = number_of<Q>(x), above = __float_as_uint(__fsub_rn(bounds[number], x)) >> 31;
        const int shift = 4 * (i ^ 1);
        ranks += (number + above) << shift;
        if (!kSigned<Q> && v[i] < 0.0f) ranks += 8u << shift;
    }
    return codes_of<Q>(ranks);
}

template <class T>
constexpr int kQuantizeTiles = 8 / sizeof(T);  // of a CUDA block, which loads them all before it needs the first

template <class T, class Q>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed, float* __restrict__ absmax, int64_t n,
                         int log2_blocksize, bool vectors, const __grid_constant__ Table16 table) {
    constexpr int kTiles = kQuantizeTiles<T>;
    PYQLORA_SHARED(float[kBounds<Q> + 2], bounds);
    if (threadIdx.x < kBounds<Q> + 2) fill_bounds<Q>(bounds, threadIdx.x, table);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTiles * kTile + threadIdx.x * kVector;
    Vector<T> loaded[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) loaded[tile] = load_tail(x, first + tile * kTile, n, vectors);
    __syncthreads();
    // As integers, magnitudes sort like floats, with infinity and then NaN on top: NaN spreads over its block.
    uint32_t key[kTiles] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (const T& value : loaded[tile].at)
            key[tile] = max(key[tile], __float_as_uint(to_float(value)) & 0x7fffffffu);
    }
    block_max(key, log2_blocksize);

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t base = first + tile * kTile;
        if (base >= n) return;
        const int64_t block = base >> log2_blocksize;
        if (base == block << log2_blocksize) absmax[block] = __uint_as_float(key[tile]);
        const float factor = __frcp_rn(__uint_as_float(max(key[tile], __float_as_uint(kTiny))));
        float v[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(to_float(loaded[tile].at[i]), factor);
        if (key[tile] >= kInfinity) {  // NaN has the last rank
#pragma unroll
            for (int i = 0; i < kVector; ++i) v[i] = base + i >= n ? 0.0f : v[i] <= 1.0f ? v[i] : 1.0f;
        }
        const uint32_t word = encode<Q>(bounds, v);
        if (vectors && base + kVector <= n) {
            *reinterpret_cast<uint32_t*>(packed + base / 2) = word;
        } else {
#pragma unroll
            for (int i = 0; i < kVector; i += 2) {
                if (base + i < n) packed[(base + i) / 2] = static_cast<uint8_t>(word >> 4 * i);
            }
        }
    }
}

// The 8-bit code of x (already divided by absmax) as bitsandbytes' CUDA kernel finds it: the nearest one, and halfway
// between two that of even index. The bounds are midpoints, and below x is what x is to be above.
__device__ __forceinline__ uint32_t rank256(const float* bounds, float x) {
    uint32_t rank = 0;
#pragma unroll
    for (int half = 128; half; half /= 2) rank += bounds[rank + half - 1] < x ? half : 0;  // NaN: 0
    return rank;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_blockwise_kernel(const T* __restrict__ x, const float* __restrict__ code, uint8_t* __restrict__ q,
                              float* __restrict__ absmax, int64_t n, int log2_blocksize, bool vectors) {
    PYQLORA_SHARED(float[255], bounds);
    if (threadIdx.x < 255) {
        const float midpoint = __fmul_rn(__fadd_rn(code[threadIdx.x], code[threadIdx.x + 1]), 0.5f);
        bounds[threadIdx.x] = threadIdx.x % 2 ? nextafterf(midpoint, -2.0f) : midpoint;  // a tie goes up to the even
    }
    const int64_t base = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kVector;
    const Vector<T> loaded = load_tail(x, base, n, vectors);
    __syncthreads();
    float largest = 0.0f;
#pragma unroll
    for (const T& value : loaded.at) largest = fmaxf(largest, fabsf(to_float(value)));  // skips NaN
    uint32_t key[1] = {__float_as_uint(largest)};
    block_max(key, log2_blocksize);
    if (base >= n) return;

    const int64_t block = base >> log2_blocksize;
    largest = __uint_as_float(key[0]);
    if (base == block << log2_blocksize) absmax[block] = largest;
    const float factor = __frcp_rn(largest);
    uint2 word{};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const uint32_t rank = largest > 0.0f ? rank256(bounds, __fmul_rn(to_float(loaded.at[i]), factor)) : 0;
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
            launch("quantize_4bit", a.x, stream, {ceil_div(a.x.numel, kQuantizeTiles<T> * kTile), kThreads},
                   quantize_4bit_kernel<T, Q>, a.x.as<T>(), a.packed.as<uint8_t>(), a.absmax.as<float>(), a.x.numel,
                   log2(a.blocksize), vectors, table16(Q::gpu_bounds));
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
