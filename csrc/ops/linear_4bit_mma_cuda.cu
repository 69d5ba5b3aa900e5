// linear_4bit on tensor cores, for up to 64 rows of x in 16 bits. W is the 16-row operand of mma.m16n8k16, tokens (rows
// of x) are the 8 columns, and neither passes through shared memory: a sum over k may be taken in any order, so lane
// (g, t) of a warp (g = lane / 4, t = lane % 4) takes the 16 weights 16 t ... 16 t + 15 of each 64 in its rows, eight
// neighbouring bytes as they lie in memory, with the same 16 elements of x for token g; the j-th of four mma then uses
// elements 4 j .. 4 j + 3 of every lane as its columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
//
// A byte of two codes becomes one operand register by one load from a table of all 256 pairs, which each lane has for
// itself in its own bank of shared memory. The pairs are unscaled: four mma cover 64 weights of a row, which lie in one
// block, and its scale multiplies their float32 sum.
//
// A low-rank update s·Bᵀ is a few more steps of k, whose weights are the rows of B and whose inputs are those of s.
#include <algorithm>

#include "core/launch.h"
#include "core/operands.cuh"
#include "ops/linear_4bit_cuda.cuh"

namespace pyqlora::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStep = Linear4bitMmaArgs::step;  // elements of k for which a warp holds weights in registers
constexpr int kGroup = 4;  // steps whose weights are under way at a time; a lane of four has a scale each
constexpr int kPairWords = 256 * 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How the warps of a thread block share the work: more tokens, more rows of W that use the same x.
template <int kTokenTiles>
struct Tiles {
    static constexpr int row_tiles = kTokenTiles == 1 ? 2 : 1;  // of 16 rows, in a warp
    static constexpr int row_warps = kTokenTiles, k_warps = kWarps / row_warps;
    static constexpr int rows = 16 * row_tiles * row_warps, tokens = 8 * kTokenTiles;
    static constexpr int stride = rows + 4;  // of a token in shared memory: two tokens are 8 banks apart
    static constexpr int blocks_per_multiprocessor = kTokenTiles <= 2 ? 2 : 1;  // 128 or 255 registers a thread
    // The pairs and the 256 values of 8-bit scales; afterwards the warps' sums.
    static constexpr int table_words = kPairWords + 256, sum_words = k_warps * tokens * stride;
    static constexpr int shared_words = table_words > sum_words ? table_words : sum_words;
};

// pairs[byte][lane]: the values of the byte's high and low nibble. A thread writes four lanes' copies at once.
template <class T>
__device__ __forceinline__ void fill_pairs(uint32_t* pairs, const Table16& table) {
    const int first = threadIdx.x / 8, lanes = threadIdx.x % 8 * 4;
    const float low = table.at[first % 16];
#pragma unroll
    for (int byte = 0; byte < 256; byte += kThreads / 8) {
        const uint32_t value = pack<T>(table.at[(byte + first) / 16], low);
        *reinterpret_cast<uint4*>(pairs + (byte + first) * 32 + lanes) = {value, value, value, value};
    }
}

// Of byte `byte` of the word, in two operations and a load: a row of the table is 128 bytes.
__device__ __forceinline__ uint32_t pair_of(const uint32_t* pairs, uint32_t word, int byte, int lane) {
    const uint32_t at = (byte ? word >> (8 * byte - 7) : word << 7) & 255 << 7 | lane * 4;
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(pairs) + at);
}

// Row `row` of an output, columns `column` .. `column` + 7 as far as there are n.
template <class T>
__device__ __forceinline__ void store_columns(T* out, int64_t row, int64_t column, int64_t n, bool vectors,
                                              const float (&v)[kVector]) {
    if (vectors && column + kVector <= n) return store_vector(out + row * n + column, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (column + i < n) out[row * n + column + i] = from_float<T>(v[i]);
    }
}

__device__ __forceinline__ void add_bias(const DeviceBias& bias, int64_t column, int64_t n, float (&v)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] += bias[min(column + i, n - 1)];
}

struct LowRank {
    const void *s, *b;  // [m, rank] like x, [n, rank]
    DType b_dtype;
    int rank;  // 0: no update
    bool vectors;
};

// partial: [splits, m, n], used if there are several splits.
template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, Tiles<kTokenTiles>::blocks_per_multiprocessor)
    linear_4bit_mma_kernel(const T* __restrict__ x, const uint8_t* __restrict__ packed, DeviceScales scales,
                           DeviceBias bias, T* __restrict__ y, float* __restrict__ partial, int m, int64_t n, int64_t k,
                           int log2_blocksize, int splits, bool vectors, LowRank update,
                           const __grid_constant__ Table16 table) {
    using Tile = Tiles<kTokenTiles>;
    constexpr int kRows = 2 * Tile::row_tiles;  // of W in a lane, 8 apart
    PYQLORA_SHARED(uint32_t[Tile::shared_words], shared);
    uint32_t* const pairs = shared;
    float* const map = reinterpret_cast<float*>(shared + kPairWords);

    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = threadIdx.x / 32 % Tile::row_warps, k_warp = threadIdx.x / 32 / Tile::row_warps;
    const int split = blockIdx.x % splits;
    const int64_t block_row = static_cast<int64_t>(blockIdx.x / splits) * Tile::rows;
    // Groups of steps are dealt to the warps one by one, from `group` on.
    const int steps = k / kStep, groups = (steps + kGroup - 1) / kGroup, slices = splits * Tile::k_warps;
    int group = split * Tile::k_warps + k_warp;

    // Where a lane's rows of W and x begin, in its loads of 8 and 16 bytes: as 32 bits, to spare registers. Beyond the
    // last row it takes that row again, and its results are dropped.
    const uint2* const weights = reinterpret_cast<const uint2*>(packed + block_row * k / 2) + t;
    const uint4* const inputs = reinterpret_cast<const uint4*>(x) + t * 2;
    const int last_row = min(n - 1 - block_row, int64_t{Tile::rows - 1}), row_pitch = k / 16, token_pitch = k / 8;
    uint32_t weight_row[kRows], token_row[kTokenTiles];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        weight_row[i] = min(row_warp * 16 * Tile::row_tiles + 8 * i + g, last_row) * row_pitch;
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) token_row[i] = min(8 * i + g, m - 1) * token_pitch;

    uint2 codes[kGroup][kRows];
    DeviceScales::Stored stored[kRows];
    auto load_codes = [&](int of_group, int s) {
        if (of_group * kGroup + s >= steps) return;
        const uint2* const from = weights + of_group * int64_t{kGroup * kStep / 16};
#pragma unroll
        for (int i = 0; i < kRows; ++i) codes[s][i] = load_streaming(from + weight_row[i] + s * (kStep / 16));
    };
    auto load_scales = [&](int of_group) {  // of step t of the group
        if (of_group >= groups) return;
        const int64_t element = block_row * k + min(of_group * kGroup + t, steps - 1) * kStep;
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            stored[i] = scales.load((element + static_cast<int64_t>(weight_row[i]) * 16) >> log2_blocksize);
    };
#pragma unroll
    for (int s = 0; s < kGroup; ++s) load_codes(group, s);
    load_scales(group);
    fill_pairs<T>(pairs, table);
    if (scales.codes) map[threadIdx.x] = __ldg(scales.nested_code + threadIdx.x);
    const float mean = scales.codes ? __ldg(scales.offset) : 0.0f;
    __syncthreads();

    float sum[Tile::row_tiles][kTokenTiles][4] = {};
    for (; group < groups; group += slices) {
        float scale[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) scale[i] = scales.decode(stored[i], map, mean);
        load_scales(group + slices);
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
            const int step = group * kGroup + s;
            if (step >= steps) break;
            uint32_t a[Tile::row_tiles][4][4];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int byte = 0; byte < 8; ++byte)
                    a[i / 2][byte / 2][i % 2 + byte % 2 * 2] =
                        pair_of(pairs, byte < 4 ? codes[s][i].x : codes[s][i].y, byte % 4, lane);
            }
            load_codes(group + slices, s);
            float step_scale[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) step_scale[i] = __shfl_sync(kAllLanes, scale[i], lane - t + s);
#pragma unroll
            for (int token = 0; token < kTokenTiles; ++token) {
                const uint4* const from =
                    inputs + group * int64_t{kGroup * kStep / 8} + token_row[token] + s * (kStep / 8);
                const uint4 low = __ldg(from), high = __ldg(from + 1);
                const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
                for (int tile = 0; tile < Tile::row_tiles; ++tile) {
                    float c[4] = {};
#pragma unroll
                    for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(c, a[tile][j], b[j], c);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sum[tile][token][i] = fmaf(step_scale[2 * tile + i / 2], c[i], sum[tile][token][i]);
                }
            }
        }
    }

    // The update's steps, dealt to the warps of the first split.
    for (int step = k_warp; split == 0 && step * 32 < update.rank; step += Tile::k_warps) {
        const int at = step * 32 + t * 8;
        Eight b[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = block_row + min(row_warp * 16 * Tile::row_tiles + 8 * i + g, last_row);
            b[i] =
                AnyRow(update.b, update.b_dtype, row * update.rank).template load<T>(at, update.rank, update.vectors);
        }
#pragma unroll
        for (int token = 0; token < kTokenTiles; ++token) {
            const T* const row = static_cast<const T*>(update.s) + min(8 * token + g, m - 1) * update.rank;
            const Eight s = load_eight(row, at, update.rank, update.vectors);
#pragma unroll
            for (int tile = 0; tile < Tile::row_tiles; ++tile) {
                const Eight &low = b[2 * tile], &high = b[2 * tile + 1];
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    const uint32_t rows[4] = {low.word[half], high.word[half], low.word[half + 1], high.word[half + 1]};
                    const uint32_t inputs[2] = {s.word[half], s.word[half + 1]};
                    mma_m16n8k16<T>(sum[tile][token], rows, inputs, sum[tile][token]);
                }
            }
        }
    }

    // The warps' sums, added in their order: [k_warps][tokens][stride] where the tables were.
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int tile = 0; tile < Tile::row_tiles; ++tile) {
#pragma unroll
        for (int token = 0; token < kTokenTiles; ++token) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = (row_warp * Tile::row_tiles + tile) * 16 + g + i / 2 * 8;
                sums[(k_warp * Tile::tokens + token * 8 + 2 * t + i % 2) * Tile::stride + row] = sum[tile][token][i];
            }
        }
    }
    __syncthreads();
    for (int unit = threadIdx.x; unit < m * (Tile::rows / kVector); unit += kThreads) {
        const int token = unit / (Tile::rows / kVector), row = unit % (Tile::rows / kVector) * kVector;
        const int64_t column = block_row + row;
        if (column >= n) continue;
        float v[kVector] = {};
#pragma unroll
        for (int w = 0; w < Tile::k_warps; ++w) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) v[i] += sums[(w * Tile::tokens + token) * Tile::stride + row + i];
        }
        if (splits > 1) {
            store_columns(partial + split * m * n, token, column, n, vectors, v);
        } else {
            add_bias(bias, column, n, v);
            store_columns(y, token, column, n, vectors, v);
        }
    }
}

// y = the sum of the splits, in their order, + bias. A thread takes eight columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const float* __restrict__ partial, DeviceBias bias, T* __restrict__ y, int m, int64_t n,
                      int splits, bool vectors) {
    const int64_t units = (n + kVector - 1) / kVector, unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t token = unit / units, column = unit % units * kVector;
    if (token >= m) return;
    float sum[kVector] = {};
    for (int split = 0; split < splits; ++split) {
        const float* from = partial + (split * m + token) * n + column;
        float v[kVector];
        if (vectors) {
            load_vector(from, v);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) v[i] = column + i < n ? __ldg(from + i) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += v[i];
    }
    add_bias(bias, column, n, sum);
    store_columns(y, token, column, n, vectors, sum);
}

// f(std::integral_constant<int, kTokenTiles>) for m rows of x.
template <class F>
auto dispatch_tokens(int64_t m, F f) {
    if (m <= 8) return f(std::integral_constant<int, 1>{});
    if (m <= 16) return f(std::integral_constant<int, 2>{});
    if (m <= 32) return f(std::integral_constant<int, 4>{});
    return f(std::integral_constant<int, 8>{});
}

template <class T>
void launch_dtype(const Linear4bitMmaArgs& a, void* stream) {
    const Linear4bitArgs& l = a.linear;
    const char* op = "linear_4bit_mma";
    const int m = static_cast<int>(l.m()), splits = static_cast<int>(a.splits());
    const bool vectors = l.n % kVector == 0 && aligned(l.y.data, 16) && aligned(a.workspace.data, 16);
    const int rank = static_cast<int>(l.rank());
    const LowRank update{l.s.data, l.b.data, l.b.dtype, rank,
                         rank % kVector == 0 && aligned(l.s.data, 16) && aligned(l.b.data, 16)};
    dispatch_tokens(m, [&](auto token_tiles) {
        using Tile = Tiles<token_tiles>;
        launch(op, l.x, stream, {ceil_div(l.n, Tile::rows) * splits, kThreads}, linear_4bit_mma_kernel<T, token_tiles>,
               l.x.as<T>(), l.packed.as<uint8_t>(), DeviceScales(l.scales), DeviceBias(l.bias), l.y.as<T>(),
               a.workspace.as<float>(), m, l.n, l.k, log2(l.blocksize), splits, vectors, update,
               table16(l.type == QuantType::nf4 ? Nf4::values : Fp4::values));
    });
    if (splits > 1)
        launch(op, l.x, stream, {ceil_div(m * ceil_div(l.n, kVector), kThreads), kThreads}, sum_splits_kernel<T>,
               a.workspace.as<float>(), DeviceBias(l.bias), l.y.as<T>(), m, l.n, splits, vectors);
}

}  // namespace

void linear_4bit_mma(const Linear4bitMmaArgs& a, void* stream) {
    if (a.linear.x.dtype == DType::f16) return launch_dtype<__half>(a, stream);
    require_bf16_tensor_cores("linear_4bit_mma", a.linear.x);
    launch_dtype<__nv_bfloat16>(a, stream);
}

int64_t linear_4bit_mma_splits(int64_t m, int64_t n, int64_t k, int64_t multiprocessors) {
    return dispatch_tokens(m, [&](auto token_tiles) {
        using Tile = Tiles<token_tiles>;
        const int64_t groups_per_warp = ceil_div(k, kGroup * kStep) / Tile::k_warps;
        return std::max<int64_t>(1, std::min(multiprocessors / ceil_div(n, Tile::rows), groups_per_warp));
    });
}

}  // namespace pyqlora::cuda
