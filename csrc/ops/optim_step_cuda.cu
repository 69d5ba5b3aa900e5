// One launch steps all tensors of a group. A warp takes chunks of 2048 elements, 256 at a time, and needs no other
// warp: a block's absmax comes from shuffles. The table of tensors travels as a kernel argument, which costs neither a
// copy nor memory that would have to outlive the launch; groups of more tensors than fit take another launch.
//
// Bit for bit the CPU's results: the rules are the same code, division and square root are IEEE's, and every sum has
// one order on both.
#include <algorithm>
#include <cfloat>
#include <numeric>

#include "core/dispatch.h"
#include "core/launch.h"
#include "core/vector.cuh"
#include "ops/optim_step.h"

namespace pyqlora::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kStateBlock == 32 * kVector && kStateBlock == kThreads);

struct Row {
    void* p;
    const void* g;
    void *state1, *state2;
    float *absmax1, *absmax2;  // of 32-bit states: unorm and none
    int64_t n;
    uint32_t first;  // chunk
    uint32_t vectors;
};
// Arguments may hold 4 KB, from CUDA 12.1 on 32,764 bytes.
constexpr int kRows = (CUDART_VERSION >= 12010 ? 32000 : 3840) / sizeof(Row);
struct Table {
    Row rows[kRows];
    int count = 0;
    uint32_t chunks = 0;
};

// The row that holds a chunk: the last that begins at or before it.
__device__ __forceinline__ int row_of(const Table& table, uint32_t chunk) {
    int low = 0, high = table.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.rows[middle].first <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// Eight elements of a buffer that the same thread writes later, so not through the read-only path; zeros from n on.
template <class T>
__device__ __forceinline__ void load(const T* x, int n, bool vectors, float (&v)[kVector]) {
    if (vectors && n >= kVector) {
        constexpr int words = sizeof(Vector<T>) / sizeof(uint4);
        union {
            uint4 word[words];
            Vector<T> vector;
        } u;
#pragma unroll
        for (int i = 0; i < words; ++i) u.word[i] = reinterpret_cast<const uint4*>(x)[i];
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = to_float(u.vector.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = i < n ? to_float(x[i]) : 0.0f;
    }
}
template <class T>
__device__ __forceinline__ void store(T* x, int n, bool vectors, const float (&v)[kVector]) {
    if (vectors && n >= kVector) return store_vector(x, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < n) x[i] = from_float<T>(v[i]);
    }
}

// The two dynamic maps in shared memory.
struct Maps {
    float values[2][256];
    float splits[2][256];  // y above splits[c] gets code c or a higher one
};
__device__ __forceinline__ void load_maps(Maps& maps, const float* const (&qmap)[2]) {
    const int c = threadIdx.x;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        if (!qmap[m]) continue;
        const float value = __ldg(qmap[m] + c);
        maps.values[m][c] = value;
        maps.splits[m][c] = c ? 0.5f * __fadd_rd(__ldg(qmap[m] + c - 1), value) : -INFINITY;
    }
    __syncthreads();
}

// The code of the entry nearest to y in [-1, 1], the lower one on a tie.
//
// A dynamic map has seven decades with 2^d evenly spaced entries (the unsigned one 2^(d+1)) of size 10^(d-6), so that
// the rank of |y| above zero follows the lowest of seven lines, less than half an entry off near 0, 1 and between two
// decades. Rounded down from half an entry below it, the rank is right or one too low, and one midpoint tells which.
__device__ __forceinline__ uint32_t encode(const float* splits, bool is_signed, float y) {
    constexpr float slopes[7] = {1e6 / 0.9, 2e5 / 0.9, 4e4 / 0.9, 8e3 / 0.9, 1.6e3 / 0.9, 320 / 0.9, 64 / 0.9};
    const float magnitude = fminf(fabsf(y), 1.0f);  // also of NaN, out of states that came in as such
    float rank = fmaf(magnitude, slopes[6], 64 * 8.0f / 9);
#pragma unroll
    for (int d = 0; d < 6; ++d) rank = fminf(rank, fmaf(magnitude, slopes[d], (1 << d) * 8.0f / 9));
    int code = static_cast<int>(is_signed ? rank - 0.5f : fmaf(2.0f, rank, -1.5f));
    if (is_signed) code = 127 + (code ^ __float_as_int(y) >> 31);  // -1 - rank below zero
    return code + (y > splits[code + 1]);
}

// Eight states of one kind, in 32 or 8 bits.
struct State {
    float v[kVector];

    __device__ __forceinline__ void load8(const uint8_t* q, const float* absmax, int n, bool vectors,
                                          const float* values, bool is_signed) {
        uint2 word;
        if (vectors && n >= kVector) {
            word = *reinterpret_cast<const uint2*>(q);
        } else {
            word.x = word.y = is_signed ? 0x7f7f7f7fu : 0u;  // zeros
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                uint32_t& half = i < 4 ? word.x : word.y;
                if (i < n) half = (half & ~(255u << 8 * (i % 4))) | static_cast<uint32_t>(q[i]) << 8 * (i % 4);
            }
        }
        const float scale = *absmax;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            v[i] = __fmul_rn(values[(i < 4 ? word.x : word.y) >> 8 * (i % 4) & 255], scale);
    }

    // Called by whole warps.
    __device__ __forceinline__ void store8(uint8_t* q, float* absmax, int n, bool vectors, const float* splits,
                                           bool is_signed) {
        uint32_t key = 0;  // magnitudes sort like their bits
#pragma unroll
        for (int i = 0; i < kVector; ++i) key = max(key, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, lanes));
        const float largest = __uint_as_float(key);
        if (threadIdx.x % 32 == 0) *absmax = largest;
        // A block too small for a normal reciprocal is stored as zeros.
        const float factor = largest >= FLT_MIN ? __fdiv_rn(1.0f, largest) : 0.0f;
        uint2 word{};
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            (i < 4 ? word.x : word.y) |= encode(splits, is_signed, __fmul_rn(v[i], factor)) << 8 * (i % 4);
        if (vectors && n >= kVector) {
            *reinterpret_cast<uint2*>(q) = word;
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (i < n) q[i] = static_cast<uint8_t>((i < 4 ? word.x : word.y) >> 8 * (i % 4));
            }
        }
    }
};

// Element i of state k of a row.
template <class Rule, class S>
__device__ __forceinline__ S* state_at(const Row& row, int k, int64_t i) {
    if (k >= Rule::signed_states) return static_cast<S*>(row.state2) + i;
    return static_cast<S*>(row.state1) + k * row.n + i;
}
template <class Rule>
__device__ __forceinline__ float* absmax_at(const Row& row, int k, int64_t i) {
    if (k >= Rule::signed_states) return row.absmax2 + i / kStateBlock;
    return row.absmax1 + k * ((row.n + kStateBlock - 1) / kStateBlock) + i / kStateBlock;
}

// Advances the states of element j and returns its u; false in `kept` where a state would not stay finite.
template <class Rule>
__device__ __forceinline__ float advance(const Rule& rule, float g, float p, State (&states)[Rule::states], int j,
                                         bool& kept) {
    float s[Rule::states];
#pragma unroll
    for (int k = 0; k < Rule::states; ++k) s[k] = states[k].v[j];
    const float u = rule.update(Rule::coupled ? fmaf(rule.weight_decay, p, g) : g, s);
    kept = true;
#pragma unroll
    for (int k = 0; k < Rule::states; ++k) kept = kept && fabsf(s[k]) <= FLT_MAX;
#pragma unroll
    for (int k = 0; k < Rule::states; ++k) states[k].v[j] = kept ? s[k] : states[k].v[j];
    return u;
}

// norms: null, or what limit_kernel left at each tensor's first chunk.
template <class T, class Rule, bool kQuantized>
__global__ void __launch_bounds__(kThreads, 3)
    optim_step_kernel(const __grid_constant__ Table table, const Rule rule, const float* qmap1, const float* qmap2,
                      const double2* norms) {
    PYQLORA_SHARED(Maps, maps);
    if constexpr (kQuantized) load_maps(maps, {qmap1, Rule::states > Rule::signed_states ? qmap2 : nullptr});
    const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32;
    if (chunk >= table.chunks) return;
    const Row& row = table.rows[row_of(table, chunk)];
    const bool vectors = row.vectors;
    const float size = norms ? static_cast<float>(rule.size * norms[row.first].x) : rule.size;
    const int64_t begin = static_cast<int64_t>(chunk - row.first) * kNormChunk, end = min(begin + kNormChunk, row.n);
#pragma unroll 1
    for (int64_t block = begin; block < end; block += kStateBlock) {
        const int64_t i = block + threadIdx.x % 32 * kVector;
        const int n = static_cast<int>(end - i);  // left from here on; may be negative
        T* const parameter = static_cast<T*>(row.p) + i;
        float g[kVector], p[kVector];
        State states[Rule::states];
        load(static_cast<const T*>(row.g) + i, n, vectors, g);
        load(parameter, n, vectors, p);
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            if constexpr (kQuantized)
                states[k].load8(state_at<Rule, uint8_t>(row, k, i), absmax_at<Rule>(row, k, block), n, vectors,
                                maps.values[k >= Rule::signed_states], k < Rule::signed_states);
            else
                load(state_at<Rule, float>(row, k, i), n, vectors, states[k].v);
        }
        if constexpr (kQuantized) __syncwarp();  // every lane has read the absmax that one will replace
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            bool kept;
            const float u = advance(rule, g[j], p[j], states, j, kept);
            p[j] = kept ? fmaf(-size, u, __fmul_rn(p[j], rule.decay)) : p[j];
        }
        store(parameter, n, vectors, p);
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            if constexpr (kQuantized)
                states[k].store8(state_at<Rule, uint8_t>(row, k, i), absmax_at<Rule>(row, k, block), n, vectors,
                                 maps.splits[k >= Rule::signed_states], k < Rule::signed_states);
            else
                store(state_at<Rule, float>(row, k, i), n, vectors, states[k].v);
        }
    }
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
}

// norms[chunk] = |u|^2 and |p|^2 of the chunk, for 32-bit states.
template <class T, class Rule>
__global__ void __launch_bounds__(kThreads, 2)
    norms_kernel(const __grid_constant__ Table table, const Rule rule, double2* norms) {
    const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32;
    if (chunk >= table.chunks) return;
    const Row& row = table.rows[row_of(table, chunk)];
    const int64_t begin = static_cast<int64_t>(chunk - row.first) * kNormChunk, end = min(begin + kNormChunk, row.n);
    double update = 0, parameter = 0;
#pragma unroll 1
    for (int64_t block = begin; block < end; block += kStateBlock) {
        const int64_t i = block + threadIdx.x % 32 * kVector;
        const int n = static_cast<int>(end - i);  // left from here on; may be negative
        float g[kVector], p[kVector];
        State states[Rule::states];
        load(static_cast<const T*>(row.g) + i, n, row.vectors, g);
        load(static_cast<const T*>(row.p) + i, n, row.vectors, p);
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) load(state_at<Rule, float>(row, k, i), n, row.vectors, states[k].v);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            bool kept;
            const double u = advance(rule, g[j], p[j], states, j, kept);
            if (j >= n) continue;
            if (kept) update += u * u;
            parameter += static_cast<double>(p[j]) * p[j];
        }
    }
    update = warp_sum(update), parameter = warp_sum(parameter);
    if (threadIdx.x % 32 == 0) norms[chunk] = make_double2(update, parameter);
}

// One warp a tensor: writes |u|, and at the tensor's first chunk the factor that holds the update to max_unorm * |p|.
__global__ void limit_kernel(const __grid_constant__ Table table, double max_unorm, double2* norms) {
    const Row& row = table.rows[blockIdx.x];
    const uint32_t chunks = static_cast<uint32_t>((row.n + kNormChunk - 1) / kNormChunk);
    double update = 0, parameter = 0;
    for (uint32_t c = threadIdx.x; c < chunks; c += 32) {
        update += norms[row.first + c].x;
        parameter += norms[row.first + c].y;
    }
    const double norm = sqrt(warp_sum(update)), limit = max_unorm * sqrt(warp_sum(parameter));
    __syncwarp();
    if (threadIdx.x) return;
    norms[row.first].x = norm > limit ? limit / norm : 1.0;
    *row.absmax1 = static_cast<float>(norm);
}

template <class T, class Rule, bool kQuantized>
void step(const OptimStepArgs& a, const Table& table, int64_t steps, double2* norms, void* stream) {
    const Rule rule(a.hyper, steps);
    const TensorRef& where = a.params[0];
    const Grid grid{ceil_div(table.chunks, kWarps), kThreads};
    if constexpr (!kQuantized) {
        if (norms) {
            launch("optim_step", where, stream, grid, norms_kernel<T, Rule>, table, rule, norms);
            launch("optim_step", where, stream, {table.count, 32}, limit_kernel, table, a.max_unorm, norms);
        }
    }
    launch("optim_step", where, stream, grid, optim_step_kernel<T, Rule, kQuantized>, table, rule, a.qmap1.as<float>(),
           a.qmap2.as<float>(), norms);
}

// A tensor's row; whether 16-byte accesses fit holds for each state stacked in state1 too.
Row row_of(const OptimStepArgs& a, size_t t, uint32_t first, int stacked) {
    auto at = [t](const std::vector<TensorRef>& list) { return list.empty() ? nullptr : list[t].data; };
    const int64_t n = a.params[t].numel, state_bytes = a.quantized() ? 1 : 4;
    Row row{a.params[t].data, a.grads[t].data, a.state1[t].data, at(a.state2), nullptr, nullptr, n, first, false};
    row.absmax1 = static_cast<float*>(a.quantized() ? at(a.absmax1) : at(a.unorm));
    row.absmax2 = static_cast<float*>(at(a.absmax2));
    const int state_align = static_cast<int>(state_bytes * kVector > 16 ? 16 : 8);
    row.vectors = aligned(row.p, 16) && aligned(row.g, 16) && aligned(row.state1, state_align) &&
                  aligned(row.state2, state_align) && (stacked == 1 || n * state_bytes % state_align == 0);
    return row;
}

}  // namespace

void optim_step(const OptimStepArgs& a, void* stream) {
    if (a.params.empty()) return;
    // The rule's constants depend on the step count: a launch for each, commonly one.
    std::vector<size_t> order(a.params.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return a.steps[x] < a.steps[y]; });
    dispatch_rule(a.rule, [&](auto tag) {
        using Rule = typename decltype(tag)::type;
        dispatch_float<__half, __nv_bfloat16>(a.params[0].dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            auto* norms = a.max_unorm > 0 ? a.workspace.as<double2>() : nullptr;
            Table table{};
            for (size_t i = 0; i < order.size(); ++i) {
                const size_t t = order[i];
                if (a.params[t].numel) {
                    table.rows[table.count++] = row_of(a, t, table.chunks, Rule::signed_states);
                    table.chunks += static_cast<uint32_t>(ceil_div(a.params[t].numel, kNormChunk));
                }
                const bool last = i + 1 == order.size() || a.steps[order[i + 1]] != a.steps[t];
                if (!last && table.count < kRows) continue;
                a.quantized() ? step<T, Rule, true>(a, table, a.steps[t], norms, stream)
                              : step<T, Rule, false>(a, table, a.steps[t], norms, stream);
                if (norms) norms += table.chunks;
                table = Table{};
            }
        });
    });
}

}  // namespace pyqlora::cuda
