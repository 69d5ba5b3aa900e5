#include "ops/linear_4bit.h"

#include <algorithm>
#include <memory>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"
#include "ops/quantize_cpu.h"

namespace pyqlora::cpu {
namespace {

constexpr int kMaxRows = 8;  // of x, for one pass over W

}  // namespace

namespace scalar {
namespace {

// The portable way is always to decode a row, then to multiply.
template <class Q>
constexpr std::nullptr_t dot_packed = nullptr;
template <class Q>
constexpr std::nullptr_t dot_spread = nullptr;
constexpr std::nullptr_t spread_row = nullptr;
constexpr int64_t kWords = 1;

float dot(const float* x, const float* w, int64_t k) {
    float sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] += x[i + j] * w[i + j];
    for (; i < k; ++i) sum[0] += x[i] * w[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

}  // namespace
}  // namespace scalar

#if PYQLORA_X86
PYQLORA_TARGET(PYQLORA_AVX2)
namespace avx2 {
namespace {
#include "ops/linear_4bit_simd.inl"
}  // namespace
}  // namespace avx2
PYQLORA_TARGET_END

PYQLORA_TARGET(PYQLORA_AVX512)
namespace avx512 {
namespace {
#include "ops/linear_4bit_simd.inl"
}  // namespace
}  // namespace avx512
PYQLORA_TARGET_END
#endif

namespace {

template <class T>
std::unique_ptr<float[]> to_floats(const TensorRef& t) {
    std::unique_ptr<float[]> floats(new float[t.numel]);
    for (int64_t i = 0; i < t.numel; ++i) floats[i] = to_float(t.as<T>()[i]);
    return floats;
}

// A tensor's values as float32: its own memory, or a copy that `owner` keeps.
const float* as_floats(const TensorRef& t, std::unique_ptr<float[]>& owner) {
    if (!t.defined() || t.dtype == DType::f32) return t.as<float>();
    owner = t.dtype == DType::f16 ? to_floats<Half>(t) : to_floats<BFloat16>(t);
    return owner.get();
}

using DotPacked = void (*)(int, const float*, int64_t, const uint8_t*, const float*, int64_t, int64_t, float*);
using DotSpread = float (*)(const float*, int64_t, const uint8_t*, const float*, int64_t);

// One row of x: the weight's bytes pass through the registers once, and x with them.
template <class T>
void one_row(const Linear4bitArgs& a, const BlockScale& scale, const float* x, const float* bias, int threads) {
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
            const float y = dot(spread.get(), k, a.packed.as<uint8_t>() + n * k / 2, scales.get(), a.blocksize);
            a.y.as<T>()[n] = from_float<T>(bias ? y + bias[n] : y);
        }
    });
}

}  // namespace

void linear_4bit(const Linear4bitArgs& a, int threads) {
    const BlockScale scale(a.scales);
    const uint8_t* packed = a.packed.as<uint8_t>();
    std::unique_ptr<float[]> x_floats, bias_floats;
    const float *x = as_floats(a.x, x_floats), *bias = as_floats(a.bias, bias_floats);
    const int64_t m = a.m(), k = a.k;
    const auto dot = PYQLORA_SELECT(dot);
    DotPacked dot_packed = nullptr;
    if (k % 32 == 0)
        dispatch_quant_type(a.type, [&](auto quant) { dot_packed = PYQLORA_SELECT(dot_packed<decltype(quant)>); });
    const bool spread = m == 1 && k % a.blocksize == 0 && dot_packed;

    dispatch_float<Half, BFloat16>(a.y.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (spread) return one_row<T>(a, scale, x, bias, threads);
        parallel_for(threads, a.n, std::max<int64_t>(1, (1 << 18) / k), [&](int64_t first, int64_t last) {
            std::unique_ptr<float[]> row(dot_packed ? nullptr : new float[k]);
            std::unique_ptr<float[]> scales(dot_packed ? new float[k / a.blocksize + 2] : nullptr);
            for (int64_t n = first; n < last; ++n) {
                if (scales) scale.range(n * k / a.blocksize, ceil_div((n + 1) * k, a.blocksize), scales.get());
                if (row) decode_4bit(packed, scale, a.type, a.blocksize, n * k, (n + 1) * k, row.get());
                for (int64_t i = 0; i < m; i += kMaxRows) {
                    const int rows = static_cast<int>(std::min<int64_t>(kMaxRows, m - i));
                    float y[kMaxRows];
                    if (dot_packed)
                        dot_packed(rows, x + i * k, k, packed, scales.get(), a.blocksize, n, y);
                    else
                        for (int j = 0; j < rows; ++j) y[j] = dot(x + (i + j) * k, row.get(), k);
                    for (int j = 0; j < rows; ++j)
                        a.y.as<T>()[(i + j) * a.n + n] = from_float<T>(bias ? y[j] + bias[n] : y[j]);
                }
            }
        });
    });
}

}  // namespace pyqlora::cpu
