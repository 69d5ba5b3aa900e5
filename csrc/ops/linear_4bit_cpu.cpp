#include "ops/linear_4bit.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"
#include "ops/linear_4bit_gemm.h"

namespace pyqlora::cpu {
namespace {

constexpr int kMaxRows = 8;  // of x, for one pass over W; more go through a matrix product
constexpr int kGroup = 16;   // rows of W that take turns with the same columns of x

}  // namespace

namespace scalar {
namespace {

// The portable way is always to decode a row, then to multiply.
template <class Q>
constexpr std::nullptr_t dot_packed = nullptr;
template <class Q>
constexpr std::nullptr_t dot_spread = nullptr;
constexpr std::nullptr_t spread_row = nullptr;
constexpr std::nullptr_t interleave_rows = nullptr;
constexpr int64_t kWords = 1;

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/linear_4bit_simd.inl"
#include "core/each_isa.inl"

namespace {

// A tensor's values as float32: its own memory, or a copy that `owner` keeps.
const float* as_floats(const TensorRef& t, std::unique_ptr<float[]>& owner) {
    if (!t.defined() || t.dtype == DType::f32) return t.as<float>();
    owner.reset(new float[t.numel]);
    rows_of(t, t.numel).read(0, 0, t.numel, owner.get());
    return owner.get();
}

using DotPacked = void (*)(int, const float*, int64_t, const uint8_t*, const float*, int64_t, int64_t, int, float*);
using DotSpread = float (*)(const float*, int64_t, const uint8_t*, const float*, int64_t);

// One row of x: the weight's bytes pass through the registers once, and x with them.
template <class T>
void one_row(const Linear4bitArgs& a, const BlockScale& scale, const float* x, const float* bias, const float* update,
             int threads) {
    DotSpread dot = nullptr;
    dispatch_quant_type(a.type, [&](auto quant) { dot = PYQLORA_SELECT(dot_spread<decltype(quant)>); });
    void (*const spread_row)(const float*, int64_t, float*) = PYQLORA_SELECT(spread_row);
    const int64_t k = a.k, words = PYQLORA_SELECT(kWords), blocks = k / a.blocksize;
    std::unique_ptr<float[]> spread(new float[ceil_div(k, words) * words]);
    spread_row(x, k, spread.get());
    parallel_for(threads, a.n, std::max<int64_t>(1, (1 << 18) / k), [&](int64_t first, int64_t last) {
        std::unique_ptr<float[]> scales(new float[blocks + words]());
        for (int64_t n = first; n < last; ++n) {
            scale.range(n * blocks, (n + 1) * blocks, scales.get());
            float y = dot(spread.get(), k, a.packed.as<uint8_t>() + n * k / 2, scales.get(), a.blocksize);
            if (bias) y += bias[n];
            if (update) y += update[n];
            a.y.as<T>()[n] = from_float<T>(y);
        }
    });
}

// s·Bᵀ in float32, for the sums of few rows of x to be added to.
std::unique_ptr<float[]> low_rank_update(const Linear4bitArgs& a) {
    if (!a.b.defined()) return nullptr;
    std::unique_ptr<float[]> s_floats, update(new float[a.m() * a.n]);
    const float* s = as_floats(a.s, s_floats);
    const RowProducts products = row_products(a.b.dtype);
    for (int64_t i = 0; i < a.m(); ++i) products(s + i * a.rank(), a.b.data, a.n, a.rank(), update.get() + i * a.n);
    return update;
}

void few_rows(const Linear4bitArgs& a, const float* bias, int threads) {
    const BlockScale scale(a.scales);
    const uint8_t* packed = a.packed.as<uint8_t>();
    std::unique_ptr<float[]> x_floats;
    const float* x = as_floats(a.x, x_floats);
    const std::unique_ptr<float[]> update = low_rank_update(a);
    const int rows = static_cast<int>(a.m());
    const int64_t k = a.k;
    const RowProducts products = row_products(DType::f32);
    DotPacked dot_packed = nullptr;
    if (k % 32 == 0)
        dispatch_quant_type(a.type, [&](auto quant) { dot_packed = PYQLORA_SELECT(dot_packed<decltype(quant)>); });
    const bool spread = rows == 1 && k % a.blocksize == 0 && dot_packed;
    std::unique_ptr<float, decltype(&std::free)> interleaved(nullptr, std::free);
    if (dot_packed && !spread) {
        void (*const interleave_rows)(const float*, int, int64_t, float*) = PYQLORA_SELECT(interleave_rows);
        interleaved.reset(static_cast<float*>(std::aligned_alloc(64, ceil_div(rows * k * 4, 64) * 64)));
        if (!interleaved) throw std::bad_alloc();
        interleave_rows(x, rows, k, interleaved.get());
    }

    dispatch_float<Half, BFloat16>(a.y.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (spread) return one_row<T>(a, scale, x, bias, update.get(), threads);
        auto store = [&](int64_t i, int64_t n, float y) {
            if (bias) y += bias[n];
            if (update) y += update[i * a.n + n];
            a.y.as<T>()[i * a.n + n] = from_float<T>(y);
        };
        parallel_for(threads, a.n, std::max<int64_t>(kGroup, (1 << 18) / k), [&](int64_t first, int64_t last) {
            if (dot_packed) {
                std::unique_ptr<float[]> scales(new float[kGroup * k / a.blocksize + 2]);
                float y[kMaxRows * kGroup];
                for (int64_t n = first; n < last; n += kGroup) {
                    const int count = static_cast<int>(std::min<int64_t>(kGroup, last - n));
                    scale.range(n * k / a.blocksize, ceil_div((n + count) * k, a.blocksize), scales.get());
                    dot_packed(rows, interleaved.get(), k, packed, scales.get(), a.blocksize, n, count, y);
                    for (int i = 0; i < rows; ++i)
                        for (int j = 0; j < count; ++j) store(i, n + j, y[i * kGroup + j]);
                }
                return;
            }
            std::unique_ptr<float[]> row(new float[k]);
            for (int64_t n = first; n < last; ++n) {
                decode_4bit(packed, scale, a.type, a.blocksize, n * k, (n + 1) * k, row.get());
                for (int i = 0; i < rows; ++i) {
                    float y;
                    products(x + i * k, row.get(), 1, k, &y);
                    store(i, n, y);
                }
            }
        });
    });
}

void many_rows(const Linear4bitArgs& a, const float* bias, int threads) {
    const Weight weight(a.packed, a.scales, a.k, a.blocksize, a.type);
    std::vector<Term> terms;
    terms.push_back({a.k, strips_along(rows_of(a.x, a.k)), columns_of_transposed(weight), {}});
    if (a.b.defined())
        terms.push_back({a.rank(), strips_along(rows_of(a.s, a.rank())), pack_along(rows_of(a.b, a.rank())), {}});
    terms.back().then = store_to(a.y, a.n, bias);
    multiply(a.m(), a.n, terms, threads);
}

}  // namespace

void linear_4bit(const Linear4bitArgs& a, int threads) {
    std::unique_ptr<float[]> bias_floats;
    const float* bias = as_floats(a.bias, bias_floats);
    if (a.m() <= kMaxRows) return few_rows(a, bias, threads);
    many_rows(a, bias, threads);
}

void linear_4bit_backward(const Linear4bitBackwardArgs& a, int threads) {
    const Weight weight(a.packed, a.scales, a.k, a.blocksize, a.type);
    const Term term{a.n, strips_along(rows_of(a.dy, a.n)), columns_of(weight), store_to(a.dx, a.k)};
    multiply(a.m(), a.k, {term}, threads);
}

}  // namespace pyqlora::cpu
