// lora_linear's gradients: ds = scale · dy·B and db = drop(dy)ᵀ·s from one pass over dy, on tensor cores. (With x for
// dy and ds for s the second product is the gradient of A.)
//
// A warp has 64 columns of dy and walks down its thread block's rows, 16 at a time. It loads each 16x64 piece twice,
// from memory once: with rows in a lane's g = lane / 4 for ds, whose sum is over columns, and with rows in t = lane % 4
// for db, whose sum is over rows.
#include <algorithm>

#include "ops/lora_linear_cuda.cuh"

namespace pyqlora::cuda {
namespace {

constexpr int kColumns = LoraBackwardArgs::columns / kLoraWarps;  // of a warp

// ds_parts [column_blocks, m, rank], db_parts [chunks, rank, n].
template <class T, int kRankTiles, bool kProject>
__global__ void __launch_bounds__(kLoraThreads, 1)
    lora_backward_kernel(const T* __restrict__ dy, const void* __restrict__ b, DType b_dtype, const T* __restrict__ s,
                         float scale, DeviceDropout dropout, float* __restrict__ ds_parts, float* __restrict__ db_parts,
                         int64_t m, int64_t n, int rank, int64_t rows_of_chunk, unsigned column_blocks,
                         unsigned rank_blocks, bool vectors) {
    constexpr int kRanks = 16 * kRankTiles, kValues = 8 * kRankTiles;
    PYQLORA_SHARED(float[kProject ? 2 * kLoraWarps * kValues * 32 : 1], sums);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int rank0 = blockIdx.x % rank_blocks * kRanks;
    const unsigned column_block = blockIdx.x / rank_blocks % column_blocks;
    const int64_t chunk = blockIdx.x / rank_blocks / column_blocks;
    const int64_t column0 = static_cast<int64_t>(column_block) * LoraBackwardArgs::columns + warp * kColumns;
    const int64_t end = min(m, (chunk + 1) * rows_of_chunk);
    const uint64_t key = dropout.key();

    uint32_t factor[2][2][2 * kRankTiles][2];  // of B: [32 columns][half][8 ranks], as the other operand of ds
    if constexpr (kProject) {
        const AnyRow values(b, b_dtype, 0);
        auto value = [&](int64_t column, int r) {
            return column < n && r < rank ? values.at(column * rank + r) : 0.0f;
        };
#pragma unroll
        for (int i = 0; i < 16 * kRankTiles; ++i) {
            const int h = i / (8 * kRankTiles), half = i / (4 * kRankTiles) % 2, word = i % 2;
            const int r = rank0 + i / 2 % (2 * kRankTiles) * 8 + g;
            const int64_t column = column0 + 32 * h + 8 * t + 4 * half + 2 * word;
            factor[h][half][i / 2 % (2 * kRankTiles)][word] = pack<T>(value(column, r), value(column + 1, r));
        }
    }

    float db[kRankTiles][8][4] = {};
    int buffer = 0;
    Eight next[4];  // row t + 4 i, columns 8 g ..., of the 16 rows to come
    const auto load_next = [&](int64_t row0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + t + 4 * i;
            next[i] = row < end ? load_eight(dy + row * n, column0 + 8 * g, n, vectors) : Eight{};
        }
    };
    load_next(chunk * rows_of_chunk);
    for (int64_t row0 = chunk * rows_of_chunk; row0 < end; row0 += 16, buffer ^= 1) {
        Eight piece[4];
        uint32_t a[kRankTiles][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) piece[i] = next[i];
        load_next(row0 + 16);
        if constexpr (!kProject) {
#pragma unroll
            for (int i = 0; i < 4; ++i) dropout.apply(key, row0 + t + 4 * i, column0 + 8 * g, piece[i]);
        }
#pragma unroll
        for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = rank0 + 16 * tile + i % 2 * 8 + g;
                const int64_t row = row0 + t + i / 2 * 8;
                auto value = [&](int64_t at) { return at < end && r < rank ? to_float(s[at * rank + r]) : 0.0f; };
                a[tile][i] = pack<T>(value(row), value(row + 4));
            }
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const unsigned halves = c % 2 ? 0x7632 : 0x5410;
            const uint32_t other[2] = {__byte_perm(piece[0].word[c / 2], piece[1].word[c / 2], halves),
                                       __byte_perm(piece[2].word[c / 2], piece[3].word[c / 2], halves)};
#pragma unroll
            for (int tile = 0; tile < kRankTiles; ++tile) mma_m16n8k16<T>(db[tile][c], a[tile], other, db[tile][c]);
        }
        if constexpr (kProject) {
            float ds[2 * kRankTiles][4] = {};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Eight low{}, high{};
                const int64_t column = column0 + 32 * h + 8 * t;
                if (row0 + g < end) low = load_eight(dy + (row0 + g) * n, column, n, vectors);
                if (row0 + g + 8 < end) high = load_eight(dy + (row0 + g + 8) * n, column, n, vectors);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t operand[4] = {low.word[2 * half], high.word[2 * half], low.word[2 * half + 1],
                                                 high.word[2 * half + 1]};
#pragma unroll
                    for (int r = 0; r < 2 * kRankTiles; ++r) mma_m16n8k16<T>(ds[r], operand, factor[h][half][r], ds[r]);
                }
            }
            // The warps' sums over their columns, two buffers by turns: one barrier for each 16 rows.
            float* const warps = sums + buffer * kLoraWarps * kValues * 32;
#pragma unroll
            for (int v = 0; v < kValues; ++v) warps[(warp * kValues + v) * 32 + lane] = ds[v / 4][v % 4];
            __syncthreads();
            for (int i = threadIdx.x; i < kValues * 32; i += kLoraThreads) {
                const int v = i / 32, row = i % 32 / 4 + v % 4 / 2 * 8, r = rank0 + v / 4 * 8 + i % 4 * 2 + v % 2;
                if (row0 + row >= end || r >= rank) continue;
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < kLoraWarps; ++w) total += warps[w * kValues * 32 + i];
                ds_parts[(column_block * m + row0 + row) * rank + r] = total * scale;
            }
        }
    }

#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rank g (+ 8), columns 8 (2 t + i % 2) ...
            const int r = rank0 + 16 * tile + i / 2 * 8 + g;
            const int64_t column = column0 + 8 * (2 * t + i % 2);
            if (r >= rank || column >= n) continue;
            float* const to = db_parts + (chunk * rank + r) * n + column;
            float v[kVector];
#pragma unroll
            for (int c = 0; c < kVector; ++c) v[c] = db[tile][c][i];
            if (vectors) {
                store_vector(to, v);
            } else {
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    if (column + c < n) to[c] = v[c];
                }
            }
        }
    }
}

}  // namespace

void lora_backward(const LoraBackwardArgs& a, void* stream) {
    const char* op = "lora_backward";
    const int64_t m = a.m(), n = a.n, rank = a.rank(), chunks = a.chunks();
    const int64_t rows_of_chunk = ceil_div(ceil_div(m, chunks), 16) * 16, column_blocks = ceil_div(n, a.columns);
    const bool vectors = n % kVector == 0 && aligned(a.dy.data, 16) && aligned(a.db_parts.data, 16);
    dispatch_16bit(op, a.dy, [&](auto tag) {
        using T = typename decltype(tag)::type;
        auto run = [&](auto rank_tiles, auto project) {
            const int64_t rank_blocks = ceil_div(rank, 16 * rank_tiles);
            launch(op, a.dy, stream, {chunks * column_blocks * rank_blocks, kLoraThreads},
                   lora_backward_kernel<T, rank_tiles, project>, a.dy.as<T>(), a.b.data, a.b.dtype, a.s.as<T>(),
                   static_cast<float>(a.scale), DeviceDropout(a.dropout), a.ds_parts.as<float>(),
                   a.db_parts.as<float>(), m, n, static_cast<int>(rank), rows_of_chunk,
                   static_cast<unsigned>(column_blocks), static_cast<unsigned>(rank_blocks), vectors);
        };
        auto ranks = [&](auto project) {
            if (rank <= 16) return run(std::integral_constant<int, 1>{}, project);
            run(std::integral_constant<int, 2>{}, project);
        };
        if (a.b.defined()) {
            ranks(std::true_type{});
            if (m) sum_parts<T>(op, a.ds_parts, a.ds, stream);
        } else {
            ranks(std::false_type{});
        }
    });
    dispatch_float<__half, __nv_bfloat16>(a.db.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (a.transposed) return sum_parts<T>(op, a.db_parts, a.db, stream);
        sum_parts_transposed<T>(op, a.db_parts, a.db, n, stream);
    });
}

int64_t lora_backward_chunks(int64_t m, int64_t n, int64_t multiprocessors) {
    const int64_t column_blocks = ceil_div(n, LoraBackwardArgs::columns);
    return std::max<int64_t>(1, std::min(ceil_div(2 * multiprocessors, column_blocks), ceil_div(m, 64)));
}

}  // namespace pyqlora::cuda
