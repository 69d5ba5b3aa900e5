// Dropout of 64 elements at a time, for AVX2 and what has it too.
#pragma once
#include "core/simd_avx2.h"

#if PYQLORA_X86
PYQLORA_TARGET(PYQLORA_AVX2)
namespace pyqlora::cpu::avx2 {

inline __m256i eight(uint64_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }

// The upper and lower halves of the 64-bit products of eight 32-bit numbers.
inline void multiply(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// Philox (philox.h) for eight neighbouring groups at once: `words` [4], with one lane for each group.
inline void philox8(uint64_t seed, uint64_t row, uint64_t group, __m256i* words) {
    __m256i c0 = _mm256_add_epi32(eight(group), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));  // group is a multiple of 8
    __m256i c1 = eight(group >> 32), c2 = eight(row), c3 = eight(row >> 32), k0 = eight(seed), k1 = eight(seed >> 32);
    const __m256i factor0 = eight(0xD2511F53u), factor1 = eight(0xCD9E8D57u);
    const __m256i step0 = eight(0x9E3779B9u), step1 = eight(0xBB67AE85u);
    for (int round = 0; round < 10; ++round) {
        __m256i high0, low0, high1, low1;
        multiply(c0, factor0, high0, low0);
        multiply(c2, factor1, high1, low1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), k0);
        c1 = low1;
        c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), k1);
        c3 = low0;
        k0 = _mm256_add_epi32(k0, step0);
        k1 = _mm256_add_epi32(k1, step1);
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// kept() (philox.h) of the 64 elements of a row from element 8 * group on: 16 bits each, all ones or zero.
inline void kept64(uint64_t seed, uint64_t row, uint64_t group, uint32_t threshold, __m128i* masks) {
    __m256i w[4];
    philox8(seed, row, group, w);
    const __m256i bound = _mm256_set1_epi16(static_cast<short>(threshold));
    for (__m256i& x : w) x = _mm256_cmpeq_epi16(_mm256_max_epu16(x, bound), x);
    // A group's eight masks are one lane of all four words.
    const __m256i a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpackhi_epi32(w[0], w[1]);
    const __m256i c = _mm256_unpacklo_epi32(w[2], w[3]), d = _mm256_unpackhi_epi32(w[2], w[3]);
    const __m256i groups[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                               _mm256_unpackhi_epi64(b, d)};
    for (int i = 0; i < 4; ++i) {
        masks[i] = _mm256_castsi256_si128(groups[i]);
        masks[i + 4] = _mm256_extracti128_si256(groups[i], 1);
    }
}

// Elements [first, first + count) of a row, which `x` points to, converted, scaled and dropped; first % 64 == 0.
template <class T>
void drop(const T* x, int64_t first, int64_t count, float scale, uint64_t seed, int64_t row, uint32_t threshold,
          float* out) {
    for (int64_t i = 0; i < count; i += 64) {
        __m128i masks[8];
        kept64(seed, row, (first + i) / 8, threshold, masks);
        T rest[64];
        float dropped[64];
        const bool whole = count - i >= 64;
        if (!whole) std::copy(x + i, x + count, rest);
        const T* from = whole ? x + i : rest;
        float* to = whole ? out + i : dropped;
        for (int g = 0; g < 8; ++g) {
            const __m256 keep = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(masks[g]));
            const __m256 value = _mm256_mul_ps(Simd::load(from + 8 * g), _mm256_set1_ps(scale));
            _mm256_storeu_ps(to + 8 * g, _mm256_and_ps(value, keep));
        }
        if (!whole) std::copy(dropped, dropped + (count - i), out + i);
    }
}

}  // namespace pyqlora::cpu::avx2
PYQLORA_TARGET_END
#endif
