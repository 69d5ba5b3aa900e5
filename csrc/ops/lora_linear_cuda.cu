// lora_linear's dropout, and its two products with activations, on tensor cores: s = scale · drop(x)·Aᵀ and
// y += drop(s·Bᵀ).
#include "ops/lora_linear_cuda.cuh"

#include <algorithm>

namespace pyqlora::cuda {
namespace {

constexpr int kRows = 32;       // of x, for one thread block: two operands of 16
constexpr int kStep = 32;       // elements of k that a warp takes at a time
constexpr int kUpColumns = 32;  // of y, for one warp

struct Factor {
    const void* data;
    int first, rank;  // of its columns of s; the count of them
    float scale;
};
struct Factors {
    Factor at[LoraFactors::max_count];
    int count;
    DType dtype;
    bool vectors;  // 16-byte loads along its rows
};

Factors device_factors(const LoraFactors& f, const std::vector<float>& scales, bool stacked, int64_t row) {
    Factors result{};
    result.count = static_cast<int>(f.factors.size());
    result.dtype = f.factors[0].dtype;
    result.vectors = true;
    int first = 0;
    for (int i = 0; i < result.count; ++i) {
        const int rank = static_cast<int>(f.rank(i));
        result.at[i] = {f.factors[i].data, first, rank, scales.empty() ? 1.0f : scales[i]};
        result.vectors = result.vectors && (row ? row : rank) % kVector == 0 && aligned(f.factors[i].data, 16);
        if (stacked) first += rank;
    }
    return result;
}

// The factor of a column of stacked ones.
__device__ __forceinline__ int factor_of(const Factors& factors, int column) {
    int f = 0;
    while (f + 1 < factors.count && column >= factors.at[f + 1].first) ++f;
    return f;
}

// The rows of a thread block and their factor; without tiles 0.
struct Rows {
    int64_t first;
    int count, factor;
};
__device__ __forceinline__ Rows rows_of(const int* tiles, int64_t tile, int64_t m) {
    if (tiles) return {__ldg(tiles + 3 * tile), __ldg(tiles + 3 * tile + 1), __ldg(tiles + 3 * tile + 2)};
    return {tile * kRows, static_cast<int>(min(m - tile * kRows, int64_t{kRows})), 0};
}

// Blocks that share a multiprocessor's registers. From sm_100 on ptxas spills in the narrow kernels below 128
// registers.
constexpr int down_blocks(int column_tiles) { return column_tiles > 2 || kArchitecture >= 1000 ? 1 : 2; }

// A warp multiplies 32 rows of x with 8 · kColumnTiles rows of the factors over its steps of k; the eight warps' sums
// meet in shared memory, as a tree. partial: [splits, m * columns], used if there are several splits.
template <class T, int kColumnTiles>
__global__ void __launch_bounds__(kLoraThreads, down_blocks(kColumnTiles))
    lora_down_kernel(const T* __restrict__ x, const __grid_constant__ Factors factors, const int* __restrict__ tiles,
                     DeviceDropout dropout, T* __restrict__ s, float* __restrict__ partial, int64_t m, int64_t k,
                     int columns, unsigned column_blocks, unsigned splits, bool vectors) {
    constexpr int kValues = 2 * kColumnTiles * 4;
    PYQLORA_SHARED(float[kLoraWarps / 2 * kValues * 32], sums);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int column0 = blockIdx.x % column_blocks * 8 * kColumnTiles;
    const unsigned split = blockIdx.x / column_blocks % splits;
    const Rows rows = rows_of(tiles, blockIdx.x / column_blocks / splits, m);
    const uint64_t key = dropout.key();

    const T* const x_first = x + rows.first * k;
    int x_row[4];  // past the last row that one again: what comes of it is dropped
#pragma unroll
    for (int i = 0; i < 4; ++i) x_row[i] = min(8 * i + g, rows.count - 1);
    const void* a_row[kColumnTiles];
    const int bytes = factors.dtype == DType::f32 ? 4 : 2;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
        const int column = column0 + 8 * c + g;
        const int f = tiles ? rows.factor : factor_of(factors, column);
        const bool there = f >= 0 && column - factors.at[f].first < factors.at[f].rank;
        a_row[c] =
            there ? static_cast<const char*>(factors.at[f].data) + (column - factors.at[f].first) * k * bytes : nullptr;
    }

    float sum[2][kColumnTiles][4] = {};
    // The steps of this warp; x is loaded a step ahead. load_factor(row, i): eight elements of a row of a factor.
    const auto multiply = [&](bool vectors, auto load_factor) {
        const int64_t first = int64_t{split * kLoraWarps + warp} * kStep + 8 * t;
        const int64_t stride = int64_t{splits} * kLoraWarps * kStep;
        Eight next[4];
        const auto load_x = [&](int64_t i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) next[r] = load_eight(x_first + x_row[r] * k, i, k, vectors);
        };
        load_x(first);
        for (int64_t i = first; i < k + 8 * t; i += stride) {
            Eight a[4], b[kColumnTiles];
#pragma unroll
            for (int c = 0; c < kColumnTiles; ++c) b[c] = load_factor(a_row[c], i);
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = next[r];
            load_x(i + stride);
#pragma unroll
            for (int r = 0; r < 4; ++r) dropout.apply(key, rows.first + 8 * r + g, i, a[r]);
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const Eight &low = a[2 * tile], &high = a[2 * tile + 1];
                    const uint32_t operand[4] = {low.word[half], high.word[half], low.word[half + 1],
                                                 high.word[half + 1]};
#pragma unroll
                    for (int c = 0; c < kColumnTiles; ++c) {
                        const uint32_t other[2] = {b[c].word[half], b[c].word[half + 1]};
                        mma_m16n8k16<T>(sum[tile][c], operand, other, sum[tile][c]);
                    }
                }
            }
        }
    };
    // One short path for each of the usual cases: what is not taken costs instruction fetches all the same.
    const auto whole = [&](auto tag) {
        using From = typename decltype(tag)::type;
        multiply(true, [&](const void* row, int64_t i) {
            return row ? load_eight_as<T>(static_cast<const From*>(row), i, k, true) : Eight{};
        });
    };
    if (vectors && factors.vectors && factors.dtype == DType::f32)
        whole(Tag<float>{});
    else if (vectors && factors.vectors && factors.dtype == dtype_of<T>)
        whole(Tag<T>{});
    else
        multiply(vectors, [&](const void* row, int64_t i) {
            return AnyRow(row, factors.dtype, 0).template load<T>(i, k, factors.vectors);
        });

    for (int half = kLoraWarps / 2; half; half /= 2) {
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int v = 0; v < kValues; ++v)
                sums[((warp - half) * kValues + v) * 32 + lane] =
                    sum[v / (4 * kColumnTiles)][v / 4 % kColumnTiles][v % 4];
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int v = 0; v < kValues; ++v)
                sum[v / (4 * kColumnTiles)][v / 4 % kColumnTiles][v % 4] += sums[(warp * kValues + v) * 32 + lane];
        }
        __syncthreads();
    }
    // All warps write what the first one has. Rotations keep a warp's values in banks of their own both times: sums
    // whose lanes' rows g follow each other, then columns that follow each other.
    const auto slot = [](int v, int g, int t) {
        constexpr int wide = kColumnTiles < 4 ? kColumnTiles : 4;
        return v * 32 + (g + (v / 4 % wide * 2 + v % 2) * (4 / wide)) % 8 * 4 + t;
    };
    if (warp == 0) {
#pragma unroll
        for (int v = 0; v < kValues; ++v)
            sums[slot(v, g, t)] = sum[v / (4 * kColumnTiles)][v / 4 % kColumnTiles][v % 4];
    }
    __syncthreads();
    constexpr int width_of_block = 8 * kColumnTiles;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * width_of_block; i += kLoraThreads) {
        const int row = i / width_of_block, in_block = i % width_of_block, column = column0 + in_block;
        if (row >= rows.count || column >= columns) continue;
        const int v = row / 16 * 4 * kColumnTiles + in_block / 8 * 4 + row % 16 / 8 * 2 + in_block % 2;
        const int f = tiles ? rows.factor : factor_of(factors, column);
        const float value = f < 0 ? 0.0f : sums[slot(v, row % 8, in_block % 8 / 2)] * factors.at[f].scale;
        const int first = tiles ? 0 : factors.at[f].first, width = tiles ? columns : factors.at[f].rank;
        const int64_t at = first * m + (rows.first + row) * width + column - first;
        if (splits > 1)
            partial[split * m * columns + at] = value;
        else
            s[at] = from_float<T>(value);
    }
}

// A warp makes 32 rows of 32 columns. Column 2 t + i of the j-th operand is column 8 t + 2 j + i of y, so that a lane
// has eight neighbours of a row.
template <class T>
__global__ void __launch_bounds__(kLoraThreads)
    lora_up_kernel(const T* __restrict__ s, const __grid_constant__ Factors factors, const int* __restrict__ tiles,
                   DeviceDropout dropout, T* __restrict__ y, int64_t m, int64_t n, int columns, unsigned column_blocks,
                   bool accumulate, bool vectors, bool s_vectors) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int64_t column0 = (static_cast<int64_t>(blockIdx.x % column_blocks) * kLoraWarps + warp) * kUpColumns;
    const Rows rows = rows_of(tiles, blockIdx.x / column_blocks, m);
    if (column0 >= n || rows.factor < 0) return;
    const Factor& factor = factors.at[rows.factor];

    float sum[2][4][4] = {};
    for (int step = 0; step < factor.rank; step += kStep) {
        const int i = step + 8 * t;
        Eight a[4], b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
            a[r] = load_eight(s + (rows.first + min(8 * r + g, rows.count - 1)) * columns, i, columns, s_vectors);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t row = min(column0 + g / 2 * 8 + 2 * j + g % 2, n - 1);
            b[j] =
                AnyRow(factor.data, factors.dtype, row * factor.rank).template load<T>(i, factor.rank, factors.vectors);
        }
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const Eight &low = a[2 * tile], &high = a[2 * tile + 1];
                const uint32_t operand[4] = {low.word[half], high.word[half], low.word[half + 1], high.word[half + 1]};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t other[2] = {b[j].word[half], b[j].word[half + 1]};
                    mma_m16n8k16<T>(sum[tile][j], operand, other, sum[tile][j]);
                }
            }
        }
    }

    const uint64_t key = dropout.key();
    const int64_t column = column0 + 8 * t;
    if (column >= n) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (8 * r + g >= rows.count) continue;
        const int64_t row = rows.first + 8 * r + g;
        T* const to = y + row * n + column;
        float v[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = sum[r / 2][e / 2][r % 2 * 2 + e % 2];
        dropout.apply(key, row, column, v);
        if (vectors) {
            float before[kVector] = {};
            if (accumulate) load_vector<false>(to, before);
#pragma unroll
            for (int e = 0; e < kVector; ++e) v[e] += before[e];
            store_vector(to, v);
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                if (column + e < n) to[e] = from_float<T>(accumulate ? v[e] + to_float(to[e]) : v[e]);
            }
        }
    }
}

// A thread takes eight neighbouring elements.
template <class T, class To>
__global__ void __launch_bounds__(kLoraThreads)
    lora_dropout_kernel(const T* x, To* y, DeviceDropout dropout, int64_t m, int64_t columns, bool vectors) {
    const int64_t groups = (columns + kVector - 1) / kVector;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kLoraThreads + threadIdx.x, row = unit / groups;
    if (row >= m) return;
    const int64_t column = unit % groups * kVector;
    const T* const from = x + row * columns + column;
    To* const to = y + row * columns + column;
    float v[kVector];
    if (vectors) {
        load_vector<false>(from, v);
    } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = column + e < columns ? to_float(from[e]) : 0.0f;
    }
    dropout.apply(dropout.key(), row, column, v);
    if (vectors) return store_vector(to, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
        if (column + e < columns) to[e] = from_float<To>(v[e]);
    }
}

// f(std::integral_constant<int, kColumnTiles>)
template <class F>
auto dispatch_columns(int64_t columns, F f) {
    if (columns <= 8) return f(std::integral_constant<int, 1>{});
    if (columns <= 16) return f(std::integral_constant<int, 2>{});
    if (columns <= 32) return f(std::integral_constant<int, 4>{});
    return f(std::integral_constant<int, 8>{});
}

int64_t tile_count(const TensorRef& tiles, int64_t m) { return tiles.defined() ? tiles.numel / 3 : ceil_div(m, kRows); }

}  // namespace

void lora_dropout(const LoraDropoutArgs& a, void* stream) {
    dispatch_float<__half, __nv_bfloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        auto run = [&](auto to) {
            using To = typename decltype(to)::type;
            const bool vectors = a.columns % kVector == 0 && aligned(a.x.data, 16) && aligned(a.y.data, 16);
            const int64_t m = a.x.numel / a.columns;
            launch("lora_dropout", a.x, stream,
                   {ceil_div(m * ceil_div(a.columns, kVector), kLoraThreads), kLoraThreads}, lora_dropout_kernel<T, To>,
                   a.x.as<T>(), a.y.as<To>(), DeviceDropout(a.dropout), m, a.columns, vectors);
        };
        if (a.y.dtype == DType::f32) return run(Tag<float>{});
        run(Tag<T>{});
    });
}

void lora_down(const LoraDownArgs& a, void* stream) {
    const char* op = "lora_down";
    const Factors factors = device_factors(a.a, a.scales, !a.tiles.defined(), a.a.length);
    const bool vectors = a.a.length % kVector == 0 && aligned(a.x.data, 16);
    const int64_t columns = a.columns(), splits = a.splits();
    dispatch_16bit(op, a.x, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_columns(columns, [&](auto column_tiles) {
            const int64_t column_blocks = ceil_div(columns, 8 * column_tiles);
            launch(op, a.x, stream, {tile_count(a.tiles, a.m()) * column_blocks * splits, kLoraThreads},
                   lora_down_kernel<T, column_tiles>, a.x.as<T>(), factors, a.tiles.as<int>(), DeviceDropout(a.dropout),
                   a.s.as<T>(), a.workspace.as<float>(), a.m(), a.a.length, static_cast<int>(columns),
                   static_cast<unsigned>(column_blocks), static_cast<unsigned>(splits), vectors);
        });
        if (splits > 1) sum_parts<T>(op, a.workspace, a.s, stream);
    });
}

void lora_up(const LoraUpArgs& a, void* stream) {
    const char* op = "lora_up";
    const Factors factors = device_factors(a.b, {}, false, 0);
    const int64_t n = a.b.length, columns = a.b.widest(), column_blocks = ceil_div(n, kLoraWarps * kUpColumns);
    const bool vectors = n % kVector == 0 && aligned(a.y.data, 16);
    const bool s_vectors = columns % kVector == 0 && aligned(a.s.data, 16);
    dispatch_16bit(op, a.y, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(op, a.y, stream, {tile_count(a.tiles, a.m()) * column_blocks, kLoraThreads}, lora_up_kernel<T>,
               a.s.as<T>(), factors, a.tiles.as<int>(), DeviceDropout(a.dropout), a.y.as<T>(), a.m(), n,
               static_cast<int>(columns), static_cast<unsigned>(column_blocks), a.accumulate, vectors, s_vectors);
    });
}

int64_t lora_down_splits(int64_t tiles, int64_t k, int64_t multiprocessors) {
    return std::max<int64_t>(
        1, std::min(2 * multiprocessors / std::max<int64_t>(1, tiles), ceil_div(k, kStep) / kLoraWarps));
}

}  // namespace pyqlora::cuda
