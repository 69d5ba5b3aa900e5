// optim_step's loops with AVX-512; see optim_step_simd.h.
#pragma once
#include "core/cpu_features.h"
#if defined(PYQLORA_X86)
#include <immintrin.h>

#include "ops/optim_step_avx2.h"

namespace pyqlora::cpu {
namespace {

PYQLORA_TARGET(PYQLORA_AVX512)
struct Avx512 : Avx2 {
    template <Update what, class Rule>
    static void apply(const Rule& rule, float size, const float* g, const float* p, float* to, float* const* s,
                      int64_t n, float* before = nullptr, uint32_t* largest = nullptr) {
        apply_rule<what>(rule, size, g, p, to, s, n, before, largest);
    }
    template <class Rule>
    static void attempt(const Rule& rule, float size, const Coded* coded, const float* g, float* p, Attempt& to,
                        int64_t n) {
        attempt_in_turn<Avx512>(rule, size, coded, g, p, to, n);
    }
    static void decode(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        static const auto decode64 = __builtin_cpu_supports("avx512vbmi") ? decode_bytes : decode_floats;
        const int64_t whole = n / 64 * 64;
        decode64(codes, q, absmax, x, whole);
        if (whole < n) Scalar::decode(codes, q + whole, absmax, x + whole, n - whole);
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        codes.sign ? encode64<true>(codes, x, factor, q, n) : encode64<false>(codes, x, factor, q, n);
        const int64_t whole = n / 64 * 64;
        if (whole < n) Scalar::encode(codes, x + whole, factor, q + whole, n - whole);
    }

  private:
    // The map lies in 16 registers: eight look-ups by the low five bits, then the choice among them by the high three.
    static void decode_floats(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        __m512 map[16];
        for (int r = 0; r < 16; ++r) map[r] = _mm512_loadu_ps(codes.map + 16 * r);
        for (int64_t i = 0; i < n; i += 16) {
            const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
            __m512 value[8];
            for (int r = 0; r < 8; ++r) value[r] = _mm512_permutex2var_ps(map[2 * r], code, map[2 * r + 1]);
            for (int half = 4, bit = 128; half > 0; half /= 2, bit /= 2) {
                const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
                for (int r = 0; r < half; ++r) value[r] = _mm512_mask_blend_ps(upper, value[r], value[r + half]);
            }
            _mm512_storeu_ps(x + i, _mm512_mul_ps(value[0], _mm512_set1_ps(absmax)));
        }
    }
    // 64 lookups at once in each of the four bytes of the map's floats, put together afterwards.
    [[gnu::target("avx512vbmi")]]
    static void decode_bytes(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        const __m512 scale = _mm512_set1_ps(absmax);
        // Putting together works in 128-bit lanes: four codes of each register go to each lane.
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int64_t i = 0; i < n; i += 64) {
            const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(q + i));
            const __mmask64 upper = _mm512_movepi8_mask(code);
            __m512i byte[4];
            for (int b = 0; b < 4; ++b) {
                auto part = [&](int r) { return _mm512_load_si512(codes.map_bytes[b] + 64 * r); };
                byte[b] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part(0), code, part(1)),
                                                 _mm512_permutex2var_epi8(part(2), code, part(3)));
            }
            const __m512i low0 = _mm512_unpacklo_epi8(byte[0], byte[1]), low1 = _mm512_unpackhi_epi8(byte[0], byte[1]);
            const __m512i high0 = _mm512_unpacklo_epi8(byte[2], byte[3]),
                          high1 = _mm512_unpackhi_epi8(byte[2], byte[3]);
            const __m512i value[4] = {_mm512_unpacklo_epi16(low0, high0), _mm512_unpackhi_epi16(low0, high0),
                                      _mm512_unpacklo_epi16(low1, high1), _mm512_unpackhi_epi16(low1, high1)};
            for (int r = 0; r < 4; ++r)
                _mm512_storeu_ps(x + i + 16 * r, _mm512_mul_ps(_mm512_castsi512_ps(value[r]), scale));
        }
    }

    // See StateCodes::Decades. On the signed map the arithmetic gives minus the distance from zero's code, so that
    // saturation cuts 128, which the negative side does not have.
    template <bool sign>
    static void encode64(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        constexpr int larger = 3, smaller = 2, smaller_magnitude = 10, fraction_left = 8;  // of range and reduce
        const auto& decades = codes.decades;
        const __m512i region0 = _mm512_loadu_si512(decades.region), region1 = _mm512_loadu_si512(decades.region + 16);
        const __m512 slopes = _mm512_loadu_ps(decades.slope), starts = _mm512_loadu_ps(decades.start);
        const __m512 lasts = _mm512_loadu_ps(decades.last), margin = _mm512_set1_ps(StateCodes::Decades::margin);
        const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(StateCodes::lowest));
        const __m512i fraction = _mm512_set1_epi32(0x7fffff), top = _mm512_set1_epi32(INT32_MIN);
        const __m512 scale = _mm512_set1_ps(sign ? -factor : factor);
        for (int64_t i = 0; i + 64 <= n; i += 64) {
            __m512i rank[4], missing = fraction;  // missing: 0 where a value is the last below a region
            __m512 distance[4];                   // from the nearest midpoint
            for (int r = 0; r < 4; ++r) {
                const __m512 y = _mm512_range_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * r), scale), lowest, larger);
                const __m512i bits = _mm512_castps_si512(y);
                const __m512i entry = _mm512_permutex2var_epi32(region0, _mm512_srli_epi32(bits, 23), region1);
                const __m512i sum = _mm512_add_epi32(bits, entry), region = _mm512_srli_epi32(sum, 23);
                __m512 start = _mm512_permutexvar_ps(region, starts);
                if (sign) {
                    missing = _mm512_min_epu32(missing, _mm512_andnot_si512(sum, fraction));
                    start = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(start), bits, top, 0xf8));
                }
                __m512 t = _mm512_fmadd_ps(y, _mm512_permutexvar_ps(region, slopes), start);
                t = _mm512_range_ps(t, _mm512_permutexvar_ps(region, lasts), smaller);
                distance[r] = _mm512_reduce_ps(t, fraction_left);
                rank[r] = _mm512_cvttps_epi32(t);
            }
            __m512i code;  // four bytes of each register in turn
            if (sign)
                code = _mm512_packs_epi16(_mm512_packs_epi32(rank[0], rank[1]), _mm512_packs_epi32(rank[2], rank[3]));
            else
                code =
                    _mm512_packus_epi16(_mm512_packus_epi32(rank[0], rank[1]), _mm512_packus_epi32(rank[2], rank[3]));
            code =
                _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), code);
            if (sign) code = _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(codes.zero)), code);
            _mm512_storeu_si512(q + i, code);
            const __m512 near =
                _mm512_range_ps(_mm512_range_ps(distance[0], distance[1], smaller_magnitude),
                                _mm512_range_ps(distance[2], distance[3], smaller_magnitude), smaller_magnitude);
            const __mmask16 unsure = _mm512_cmplt_ps_mask(near, margin) | _mm512_testn_epi32_mask(missing, missing);
            // Too near a midpoint to tell by arithmetic: about one value in two thousand.
            for (unsigned left = unsure; left; left &= left - 1)
                for (int64_t at = i + __builtin_ctz(left), r = 0; r < 4; ++r, at += 16) q[at] = codes(x[at] * factor);
        }
    }
};
PYQLORA_TARGET_END

}  // namespace
}  // namespace pyqlora::cpu
#endif
