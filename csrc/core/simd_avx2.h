// AVX2 primitives over 32 elements (four registers of 8); the names of simd_avx512.h.
#pragma once
#include "core/cpu_features.h"

#if PYQLORA_X86
#include <immintrin.h>

#include "core/float16.h"
#include "core/quant_types.h"

PYQLORA_TARGET(PYQLORA_AVX2)
namespace pyqlora::cpu::avx2 {

struct Simd {
    static constexpr int width = 8;
    static constexpr int registers = 32 / width;
    static constexpr int tile_rows = 6;  // of a product (gemm.h): two registers each, and two for columns
    using Floats = __m256;
    using Ints = __m256i;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats set(float x) { return _mm256_set1_ps(x); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(Floats x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static Floats load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static Floats load(const BFloat16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }

    // Rounds to nearest even; the bits of 8 halves or bfloat16s.
    static __m128i round(Floats x, Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
    static __m128i round(Floats x, BFloat16) {
        const Ints u = _mm256_castps_si256(x);
        const Ints odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const Ints up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const Ints quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const Ints r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    }

    static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
    template <class T>
    static void store(T* p, Floats x) {
        _mm_storeu_si128((__m128i*)p, round(x, T{}));
    }

    static Ints load_words(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static Ints load_words(const uint8_t* p, int64_t count) {
        return _mm256_maskload_epi32((const int*)p,
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), iota()));
    }
    static Floats spread(const float* p, Ints index) {
        return _mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)p), index);
    }
    static Ints iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static Ints shift_right(Ints x, int count) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(count)); }

    static Ints abs_bits(Floats x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
    static Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
    static float max_abs(Ints bits) {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return bit_cast<float>(_mm_cvtsi128_si32(m));
    }

    // "not <=" and not ">", so that a NaN is above everything; true is -1.
    static Ints above(Floats x, Floats bound) { return _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_NLE_UQ)); }

    // A binary search with one table per level; `rank` holds the bits found so far.
    template <class Q>
    static void encode(const Floats* x, uint8_t* packed) {
        const auto& b = Q::bounds;
        const Floats levels[3] = {_mm256_setr_ps(b[3], b[11], 0, 0, 0, 0, 0, 0),
                                  _mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0),
                                  _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14])};
        Ints ranks[4];
        for (int r = 0; r < 4; ++r) {
            Ints rank = _mm256_abs_epi32(above(x[r], _mm256_set1_ps(b[7])));
            for (const Floats& level : levels) {
                const Ints right = above(x[r], _mm256_permutevar8x32_ps(level, rank));
                rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), right);
            }
            ranks[r] = rank;
        }
        // Packing works in 128-bit lanes; the permutation puts the groups of four back in order.
        const Ints mixed =
            _mm256_packs_epi16(_mm256_packs_epi32(ranks[0], ranks[1]), _mm256_packs_epi32(ranks[2], ranks[3]));
        Ints codes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        if (Q::type == QuantType::fp4) {
            const __m128i order = _mm_loadu_si128((const __m128i*)Q::order);
            codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(order), codes);
        }
        const Ints pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128((__m128i*)packed, bytes);
    }

    template <class Q>
    struct Lookup;
    template <class T>
    struct Table;  // of float, Half or BFloat16

    // The values of codes 0 to 15, unscaled, looked up for a register of codes.
    template <class Q>
    struct Codebook {
        __m256 low, high;
        Codebook() : low(_mm256_loadu_ps(Q::values)), high(_mm256_loadu_ps(Q::values + 8)) {}
        Floats operator()(Ints code) const {
            const Floats bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), bit3);
        }
    };
    static Ints widen(__m128i bytes) { return _mm256_cvtepu8_epi32(bytes); }  // the lowest `width` bytes

    template <class Q, class T>
    static Table<T> table(float scale) {
        const Floats s = _mm256_set1_ps(scale);
        return Table<T>(_mm256_mul_ps(_mm256_loadu_ps(Q::values), s), _mm256_mul_ps(_mm256_loadu_ps(Q::values + 8), s));
    }
};

// A byte shuffle looks up one byte of each float; interleaving the four planes puts the floats together. That is exact,
// and cheaper than 32-bit permutations, which go through one port where byte shuffles have two.
template <class Q>
struct Simd::Lookup {
    // Register j of a decoded register of words holds the high (j < 4) or low nibbles of 4 bytes of each half.
    static constexpr int64_t weight(int j, int lane) { return 32 * (lane / 4) + 8 * (j % 4) + 2 * (lane % 4) + j / 4; }

    Ints plane[4];
    Lookup() {
        alignas(16) uint8_t bytes[4][16];
        for (int i = 0; i < 16; ++i)
            for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(bit_cast<uint32_t>(Q::values[i]) >> 8 * b);
        for (int b = 0; b < 4; ++b) plane[b] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[b]));
    }

    // 16 codes of each half, a byte each, to four of each half in each register.
    void look_up(Ints codes, Floats* out) const {
        const Ints b0 = _mm256_shuffle_epi8(plane[0], codes), b1 = _mm256_shuffle_epi8(plane[1], codes);
        const Ints b2 = _mm256_shuffle_epi8(plane[2], codes), b3 = _mm256_shuffle_epi8(plane[3], codes);
        const Ints low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
        const Ints high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
        out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
        out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
        out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
        out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
    }
    void decode(Ints words, Floats* out) const {
        const Ints mask = _mm256_set1_epi8(15);
        look_up(_mm256_and_si256(_mm256_srli_epi16(words, 4), mask), out);
        look_up(_mm256_and_si256(words, mask), out + 4);
    }
};

template <>
struct Simd::Table<float> {
    __m256 low, high;  // codes 0-7 and 8-15
    Table(__m256 low, __m256 high) : low(low), high(high) {}

    // Register r of the four that 16 bytes decode to.
    Floats decode(const uint8_t* packed, int r) const {
        const Ints shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        int32_t four;
        __builtin_memcpy(&four, packed + 4 * r, 4);
        const Ints code = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);  // in the lowest 4 bits
        const Floats bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), bit3);
    }
    void decode(const uint8_t* packed, Floats* out) const {
        for (int r = 0; r < 4; ++r) out[r] = decode(packed, r);
    }
    template <bool stream>
    void decode_to(const uint8_t* packed, float* out) const {
        Floats v[4];
        decode(packed, v);
        for (int r = 0; r < 4; ++r) {
            if (stream)
                _mm256_stream_ps(out + 8 * r, v[r]);
            else
                _mm256_storeu_ps(out + 8 * r, v[r]);
        }
    }
};

template <class T>
struct Simd::Table {
    __m256i low, high;  // the low and the high byte of each value, for the byte shuffle, in both lanes
    Table(__m256 a, __m256 b) {
        const __m128i va = round(a, T{}), vb = round(b, T{}), mask = _mm_set1_epi16(0xff);
        low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(va, mask), _mm_and_si128(vb, mask)));
        high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(va, 8), _mm_srli_epi16(vb, 8)));
    }

    template <bool stream>
    void decode_to(const uint8_t* packed, T* out) const {
        const __m128i bytes = _mm_loadu_si128((const __m128i*)packed), mask = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), odd = _mm_and_si128(bytes, mask);
        // 32 codes in the order in which the unpack below leaves each lane: elements 0-7 and 16-23 | 8-15 and 24-31
        const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
        const Ints codes = _mm256_permute4x64_epi64(_mm256_set_m128i(second, first), 0xd8);
        const Ints lo = _mm256_shuffle_epi8(low, codes), hi = _mm256_shuffle_epi8(high, codes);
        const Ints a = _mm256_unpacklo_epi8(lo, hi), b = _mm256_unpackhi_epi8(lo, hi);
        if (stream) {
            _mm256_stream_si256((__m256i*)out, a);
            _mm256_stream_si256((__m256i*)(out + 16), b);
        } else {
            _mm256_storeu_si256((__m256i*)out, a);
            _mm256_storeu_si256((__m256i*)(out + 16), b);
        }
    }
};

}  // namespace pyqlora::cpu::avx2
PYQLORA_TARGET_END
#endif
