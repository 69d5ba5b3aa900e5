// Dropout of 64 elements at a time, for AVX2 and what has it too.
#pragma once
#include "core/simd_avx2.h"

#if PYQLORA_X86
PYQLORA_TARGET(PYQLORA_AVX2)
namespace pyqlora::cpu::avx2 {

// Philox (philox.h) for eight groups of eight elements at once. Each has a 64-bit lane of two registers, in whose lower
// half the words are kept, for there the instruction that multiplies looks; what the upper half holds is of no account.
class Philox8 {
  public:
    explicit Philox8(uint64_t seed) {
        auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (auto& key : keys_) {
            key[0] = _mm256_set1_epi64x(key0);
            key[1] = _mm256_set1_epi64x(key1);
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
    }

    // The bits of groups `group` (a multiple of 8) to group + 7: 0 and 2, 1 and 3, 4 and 6, 5 and 7.
    void operator()(uint64_t row, uint64_t group, __m256i* pairs) const {
        const __m256i factor0 = _mm256_set1_epi64x(0xD2511F53u), factor1 = _mm256_set1_epi64x(0xCD9E8D57u);
        const __m256i first = _mm256_set1_epi64x(group), upper = _mm256_set1_epi64x(group >> 32);
        __m256i c0[2] = {_mm256_add_epi64(first, _mm256_setr_epi64x(0, 1, 2, 3)),
                         _mm256_add_epi64(first, _mm256_setr_epi64x(4, 5, 6, 7))};
        __m256i c1[2] = {upper, upper}, c2[2], c3[2];
        for (int i = 0; i < 2; ++i) c2[i] = _mm256_set1_epi64x(row), c3[i] = _mm256_set1_epi64x(row >> 32);
        for (const auto& key : keys_) {
            for (int i = 0; i < 2; ++i) {  // side by side: one alone waits for its products
                const __m256i p0 = _mm256_mul_epu32(c0[i], factor0), p1 = _mm256_mul_epu32(c2[i], factor1);
                c0[i] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[i], key[0]));
                c1[i] = p1;
                c2[i] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[i], key[1]));
                c3[i] = p0;
            }
        }
        for (int i = 0; i < 2; ++i) {
            const __m256i low = _mm256_blend_epi32(c0[i], _mm256_slli_epi64(c1[i], 32), 0xaa);
            const __m256i high = _mm256_blend_epi32(c2[i], _mm256_slli_epi64(c3[i], 32), 0xaa);
            pairs[2 * i] = _mm256_unpacklo_epi64(low, high);
            pairs[2 * i + 1] = _mm256_unpackhi_epi64(low, high);
        }
    }

  private:
    __m256i keys_[10][2];
};

// kept() (philox.h) of the 64 elements of a row from element 8 * group on: 16 bits each, all ones or zero.
inline void kept64(const Philox8& philox, uint64_t row, uint64_t group, uint32_t threshold, __m128i* masks) {
    __m256i pairs[4];
    philox(row, group, pairs);
    const __m256i bound = _mm256_set1_epi16(static_cast<short>(threshold));
    for (int i = 0; i < 4; ++i) {
        const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(pairs[i], bound), pairs[i]);
        const int first = i / 2 * 4 + i % 2;
        masks[first] = _mm256_castsi256_si128(kept);
        masks[first + 2] = _mm256_extracti128_si256(kept, 1);
    }
}

// Elements [first, first + count) of a row, which `x` points to, converted, scaled and dropped; first % 64 == 0.
template <class T>
void drop(const T* x, int64_t first, int64_t count, float scale, uint64_t seed, int64_t row, uint32_t threshold,
          float* out) {
    const Philox8 philox(seed);
    for (int64_t i = 0; i < count; i += 64) {
        __m128i masks[8];
        kept64(philox, row, (first + i) / 8, threshold, masks);
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
