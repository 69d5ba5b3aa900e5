// AVX-512 primitives over 32 elements (two registers of 16), the unit that all block sizes are multiples of.
// simd_avx2.h has the same names; kernels are written once against them.
#pragma once
#include "core/cpu_features.h"

#if PYQLORA_X86
#include <immintrin.h>

#include "core/float16.h"
#include "core/quant_types.h"

PYQLORA_TARGET(PYQLORA_AVX512)
namespace pyqlora::cpu::avx512 {

struct Simd {
    static constexpr int width = 16;
    static constexpr int registers = 32 / width;
    static constexpr int tile_rows = 12;  // of a product (gemm.h): two registers each, and two for columns
    using Floats = __m512;
    using Ints = __m512i;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats set(float x) { return _mm512_set1_ps(x); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Floats x) { return _mm512_reduce_add_ps(x); }

    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static Floats load(const BFloat16* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }

    // Rounds to nearest even; the bits of 16 halves or bfloat16s.
    static __m256i round(Floats x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
    static __m256i round(Floats x, BFloat16) {
        const Ints u = _mm512_castps_si512(x);
        const Ints odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const Ints up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        const Ints quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
        const Ints r = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
    }

    static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    template <class T>
    static void store(T* p, Floats x) {
        _mm256_storeu_si256((__m256i*)p, round(x, T{}));
    }

    // 4 packed bytes, that is 8 weights, to a lane; all words, or the first `count` and then zeros.
    static Ints load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Ints load_words(const uint8_t* p, int64_t count) {
        return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p);
    }
    // Lane i is p[index[i]], of p[0] to p[3].
    static Floats spread(const float* p, Ints index) {
        return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x4(_mm_loadu_ps(p)));
    }
    static Ints iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static Ints shift_right(Ints x, int count) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(count)); }

    // |x| as ordered integers: a NaN is above infinity, so that the largest of them tells of it.
    static Ints abs_bits(Floats x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
    static Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
    static float max_abs(Ints bits) { return bit_cast<float>(_mm512_reduce_max_epi32(bits)); }

    // Ranks of x among Q's bounds, found by descending a binary tree held in one register, packed to 16 bytes.
    template <class Q>
    static void encode(const Floats* x, uint8_t* packed) {
        const auto& b = Q::bounds;
        const Floats tree = _mm512_setr_ps(0, b[7], b[3], b[11], b[1], b[5], b[9], b[13], b[0], b[2], b[4], b[6], b[8],
                                           b[10], b[12], b[14]);
        const Ints one = _mm512_set1_epi32(1);
        __m128i bytes[2];
        for (int r = 0; r < 2; ++r) {
            Ints node = one;
            for (int level = 0; level < 4; ++level) {
                // "not <=" and not ">", so that a NaN gets the last rank
                const __mmask16 right = _mm512_cmp_ps_mask(x[r], _mm512_permutexvar_ps(node, tree), _CMP_NLE_UQ);
                node = _mm512_add_epi32(node, node);
                node = _mm512_mask_add_epi32(node, right, node, one);
            }
            bytes[r] = _mm512_cvtepi32_epi8(node);  // 16 + rank
        }
        __m256i codes = _mm256_set_m128i(bytes[1], bytes[0]);
        codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
        if (Q::type == QuantType::fp4) {
            const __m128i order = _mm_loadu_si128((const __m128i*)Q::order);
            codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(order), codes);
        }
        const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
        _mm_storeu_si128((__m128i*)packed, _mm256_cvtepi16_epi8(pairs));
    }

    // The 16 values as they are. Of the 8 * width weights in a register of words, decode puts weight(j, lane) into that
    // lane of its register j.
    template <class Q>
    struct Lookup;

    // A block's 16 values: code table times scale, so that decoding is a lookup and gives the rounded product exactly.
    template <class T>
    struct Table;  // of float, Half or BFloat16

    // The values of codes 0 to 15, unscaled, looked up for a register of codes.
    template <class Q>
    struct Codebook {
        __m512 values;
        Codebook() : values(_mm512_loadu_ps(Q::values)) {}
        Floats operator()(Ints code) const { return _mm512_permutexvar_ps(code, values); }
    };
    static Ints widen(__m128i bytes) { return _mm512_cvtepu8_epi32(bytes); }  // the lowest `width` bytes

    template <class Q, class T>
    static Table<T> table(float scale) {
        return Table<T>(_mm512_mul_ps(_mm512_loadu_ps(Q::values), _mm512_set1_ps(scale)));
    }
};

template <class Q>
struct Simd::Lookup {
    static constexpr int64_t weight(int j, int lane) { return 8 * lane + j; }

    __m512 values;
    Lookup() : values(_mm512_loadu_ps(Q::values)) {}

    void decode(Ints words, Floats* out) const {
        // The earlier weight of a byte is in its high nibble; the permutation uses the lowest 4 bits.
        for (int j = 0; j < 8; ++j) out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * (j ^ 1)), values);
    }
};

template <>
struct Simd::Table<float> {
    __m512 values;
    explicit Table(__m512 v) : values(v) {}

    // Register r of the two that 16 bytes decode to.
    Floats decode(const uint8_t* packed, int r) const {
        const Ints bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)packed));
        // Byte j to dwords 2j and 2j + 1; the high nibble goes down in the even ones. The lookup uses 4 bits of each.
        const Ints low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const Ints own = _mm512_add_epi32(low, _mm512_set1_epi32(8 * r)), shifts = _mm512_set1_epi64(4);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, own), shifts), values);
    }
    void decode(const uint8_t* packed, Floats* out) const {
        for (int r = 0; r < 2; ++r) out[r] = decode(packed, r);
    }
    template <bool stream>
    void decode_to(const uint8_t* packed, float* out) const {
        Floats v[2];
        decode(packed, v);
        for (int r = 0; r < 2; ++r) {
            if (stream)
                _mm512_stream_ps(out + 16 * r, v[r]);
            else
                _mm512_storeu_ps(out + 16 * r, v[r]);
        }
    }
};

template <class T>
struct Simd::Table {
    __m512i values;  // twice, as the lookup uses 5 bits and the fifth is the neighbour's
    explicit Table(__m512 v) {
        const __m256i rounded = round(v, T{});
        values = _mm512_inserti64x4(_mm512_castsi256_si512(rounded), rounded, 1);
    }

    template <bool stream>
    void decode_to(const uint8_t* packed, T* out) const {
        const Ints bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)packed));
        const Ints words = _mm512_shuffle_epi8(
            bytes, _mm512_setr_epi64(0x0101010100000000, 0x0303030302020202, 0x0505050504040404, 0x0707070706060606,
                                     0x0909090908080808, 0x0b0b0b0b0a0a0a0a, 0x0d0d0d0d0c0c0c0c, 0x0f0f0f0f0e0e0e0e));
        const Ints codes = _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
        const Ints v = _mm512_permutexvar_epi16(codes, values);
        if (stream)
            _mm512_stream_si512((__m512i*)out, v);
        else
            _mm512_storeu_si512((__m512i*)out, v);
    }
};

}  // namespace pyqlora::cpu::avx512
PYQLORA_TARGET_END
#endif
