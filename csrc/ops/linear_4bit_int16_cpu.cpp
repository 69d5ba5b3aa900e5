#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "ops/linear_4bit.h"
#include "ops/quantize_cpu.h"

namespace pyqlora::cpu {
#if PYQLORA_X86
namespace {

// A register of words holds 64 weights; the 64 elements of x that meet them share a scale.
constexpr int64_t kChunk = 64;
// Integers for 1 and for a chunk's largest magnitude: a 32-bit lane adds eight products, which stays below 2^31.
constexpr float kWeightOne = 16384, kLargest = 16383;

// x as integers in the order in which weights are decoded, zeros at the end. A chunk that is not finite gets the scale
// NaN; one too small for a normal reciprocal counts as zeros.
template <class T>
void quantize_activations(const T* x, int64_t k, int16_t* values, float* scales) {
    for (int64_t begin = 0; begin < k; begin += kChunk) {
        const int64_t count = std::min(kChunk, k - begin);
        float chunk[kChunk] = {};
        uint32_t bits = 0;  // of the largest magnitude
        for (int64_t i = 0; i < count; ++i) {
            chunk[i] = to_float(x[begin + i]);
            bits = std::max(bits, bit_cast<uint32_t>(chunk[i]) & 0x7fffffffu);
        }
        const float largest = bit_cast<float>(bits);
        const bool finite = bits < 0x7f800000u, zero = largest < kLargest * std::numeric_limits<float>::min();
        const float factor = finite && !zero ? kLargest / largest : 0.0f;
        for (int64_t v = 0; v < 4; ++v)
            for (int64_t lane = 0; lane < 16; ++lane) {
                const float y = chunk[2 * (16 * (lane / 8) + 8 * (v % 2) + lane % 8) + v / 2] * factor;
                *values++ = finite ? static_cast<int16_t>(std::lrint(y)) : 0;
            }
        *scales++ = finite ? largest / kLargest / kWeightOne : std::numeric_limits<float>::quiet_NaN();
    }
}

}  // namespace

PYQLORA_TARGET(PYQLORA_AVX2)
namespace {

// The dot product of x with one row of W. `scales`: those of the row's blocks, and zeros up to a chunk's end.
template <class Q>
float dot_int16(const int16_t* x, const float* x_scales, int64_t k, const uint8_t* row, const float* scales,
                int64_t blocksize) {
    using Simd = avx2::Simd;
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
        const float scaled = Q::values[i] * kWeightOne;
        const auto value = static_cast<uint16_t>(static_cast<int16_t>(scaled + (scaled < 0 ? -0.5f : 0.5f)));
        bytes[0][i] = static_cast<uint8_t>(value), bytes[1][i] = static_cast<uint8_t>(value >> 8);
    }
    auto plane = [&](int b) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[b])); };
    const __m256i low = plane(0), high = plane(1), mask = _mm256_set1_epi8(15);
    const int log_blocksize = __builtin_ctzll(static_cast<uint64_t>(blocksize));
    const __m256i block = Simd::shift_right(Simd::iota(), log_blocksize - 3);
    __m256 sum = Simd::zero();
    for (int64_t i = 0; i < k; i += kChunk, x += kChunk) {
        __builtin_prefetch(row + i / 2 + 4096);  // a page ahead: the hardware stops at each page
        const __m256i words = i + kChunk <= k ? _mm256_loadu_si256((const __m256i*)(row + i / 2))
                                              : Simd::load_words(row + i / 2, (k - i) / 8);
        auto add_products = [&](__m256i codes, int v) {
            const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
            auto at = [&](int r) { return _mm256_loadu_si256((const __m256i*)(x + 16 * r)); };
            return _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpacklo_epi8(lows, highs), at(v)),
                                    _mm256_madd_epi16(_mm256_unpackhi_epi8(lows, highs), at(v + 1)));
        };
        const __m256i earlier = add_products(_mm256_and_si256(_mm256_srli_epi16(words, 4), mask), 0);
        const __m256i products = _mm256_add_epi32(earlier, add_products(_mm256_and_si256(words, mask), 2));
        const __m256 scale = Simd::mul(Simd::spread(scales + (i >> log_blocksize), block), Simd::set(*x_scales++));
        sum = Simd::fma(_mm256_cvtepi32_ps(products), scale, sum);
    }
    return Simd::sum(sum);
}

}  // namespace
PYQLORA_TARGET_END

void linear_4bit_int16(const Linear4bitInt16Args& args, int threads) {
    const Linear4bitArgs& a = args.linear;
    const int64_t k = a.k, chunks = ceil_div(k, kChunk), blocks = k / a.blocksize;
    std::vector<int16_t> x(chunks * kChunk);
    std::vector<float> x_scales(chunks), y(a.n);
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        quantize_activations(a.x.as<typename decltype(tag)::type>(), k, x.data(), x_scales.data());
    });
    const BlockScale scale(a.scales);
    dispatch_quant_type(a.type, [&](auto quant) {
        parallel_for(threads, a.n, std::max<int64_t>(1, (1 << 18) / k), [&](int64_t first, int64_t last) {
            std::vector<float> scales(blocks + kChunk / 8);
            for (int64_t n = first; n < last; ++n) {
                scale.range(n * blocks, (n + 1) * blocks, scales.data());
                const uint8_t* row = a.packed.as<uint8_t>() + n * k / 2;
                y[n] = dot_int16<decltype(quant)>(x.data(), x_scales.data(), k, row, scales.data(), a.blocksize);
            }
        });
    });
    if (a.bias.defined())
        dispatch_float<Half, BFloat16>(a.bias.dtype, [&](auto tag) {
            for (int64_t n = 0; n < a.n; ++n) y[n] += to_float(a.bias.as<typename decltype(tag)::type>()[n]);
        });
    if (a.b.defined())
        dispatch_float<Half, BFloat16>(a.b.dtype, [&](auto b_tag) {
            dispatch_float<Half, BFloat16>(a.s.dtype, [&](auto s_tag) {
                const auto* b = a.b.as<typename decltype(b_tag)::type>();
                const auto* s = a.s.as<typename decltype(s_tag)::type>();
                for (int64_t n = 0; n < a.n; ++n) {
                    float update = 0;
                    for (int64_t r = 0; r < a.rank(); ++r) update += to_float(s[r]) * to_float(*b++);
                    y[n] += update;
                }
            });
        });
    dispatch_float<Half, BFloat16>(a.y.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        for (int64_t n = 0; n < a.n; ++n) a.y.as<T>()[n] = from_float<T>(y[n]);
    });
}

#else
void linear_4bit_int16(const Linear4bitInt16Args&, int) {}  // check() refuses
#endif

}  // namespace pyqlora::cpu
