// What optim_step does on each instruction set, over runs of one block's elements: the update itself, conversions, and
// 8-bit states to floats and back.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/cpu_features.h"
#include "core/float16.h"
#include "ops/optim_step.h"
#include "ops/state_codes.h"
#if defined(PYQLORA_X86)
#include <immintrin.h>
#endif

namespace pyqlora::cpu {
namespace {

// `a` where the mask is ones, else `b`. Written on the bits, which keeps the compiler from branching around a store.
[[gnu::always_inline]] inline float select(uint32_t mask, float a, float b) {
    return bit_cast<float>((bit_cast<uint32_t>(a) & mask) | (bit_cast<uint32_t>(b) & ~mask));
}

// Magnitudes sort like their bits.
[[gnu::always_inline]] inline uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
constexpr uint32_t largest_finite = 0x7f7fffffu;

// What an update does beside changing the states:
enum class Update {
    step,       // p, leaving elements alone whose states would not be finite
    direction,  // u in the place of p, 0 for such elements, and no states
    attempt,    // p, with no eye on such elements but in the states' largest magnitudes; p as it was goes to `before`
};

// One loop for every rule and instruction set: the compiler vectorizes it in each of the functions that inline it.
// `to` may be `p`.
template <Update what, class Rule>
[[gnu::always_inline]] inline void apply_rule(const Rule& rule, float size, const float* g, const float* p, float* to,
                                              float* const* states, int64_t n, float* before, uint32_t* largest) {
    float* const at[3] = {states[0], states[1], states[2]};
    uint32_t tops[Rule::states] = {};
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        float s[Rule::states];
        for (int k = 0; k < Rule::states; ++k) s[k] = at[k][i];
        const float gradient = Rule::coupled ? fmaf(rule.weight_decay, p[i], g[i]) : g[i];
        const float u = rule.update(gradient, s), updated = fmaf(-size, u, p[i] * rule.decay);
        if constexpr (what == Update::attempt) {
            before[i] = p[i];
            to[i] = updated;
            for (int k = 0; k < Rule::states; ++k) {
                at[k][i] = s[k];
                tops[k] = std::max(tops[k], magnitude(s[k]));
            }
            continue;
        }
        uint32_t unfinite = 0;
        for (int k = 0; k < Rule::states; ++k) unfinite |= magnitude(s[k]) > largest_finite;
        const uint32_t keep = 0u - unfinite;
        if constexpr (what == Update::direction) {
            to[i] = select(keep, 0.0f, u);
        } else {
            to[i] = select(keep, p[i], updated);
            for (int k = 0; k < Rule::states; ++k) at[k][i] = select(keep, at[k][i], s[k]);
        }
    }
    if constexpr (what == Update::attempt) std::copy_n(tops, Rule::states, largest);
}

[[gnu::always_inline]] inline float largest_magnitude(const float* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(x[i]));
    return bit_cast<float>(largest);
}

template <class From, class To>
[[gnu::always_inline]] inline void convert(const From* from, To* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<To>(to_float(from[i]));
}

struct Scalar {
    template <Update what, class Rule>
    static void apply(const Rule& rule, float size, const float* g, const float* p, float* to, float* const* s,
                      int64_t n, float* before = nullptr, uint32_t* largest = nullptr) {
        apply_rule<what>(rule, size, g, p, to, s, n, before, largest);
    }
    template <class From, class To>
    static void copy(const From* from, To* to, int64_t n) {
        convert(from, to, n);
    }
    static float absmax(const float* x, int64_t n) { return largest_magnitude(x, n); }
    static void decode(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) x[i] = codes.map[q[i]] * absmax;
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        for (int64_t i = 0; i < n; ++i) q[i] = codes(x[i] * factor);
    }
};

#if defined(PYQLORA_X86)
PYQLORA_TARGET(PYQLORA_AVX2)
struct Avx2 {
    template <Update what, class Rule>
    static void apply(const Rule& rule, float size, const float* g, const float* p, float* to, float* const* s,
                      int64_t n, float* before = nullptr, uint32_t* largest = nullptr) {
        apply_rule<what>(rule, size, g, p, to, s, n, before, largest);
    }
    template <class From, class To>
    static void copy(const From* from, To* to, int64_t n) {
        convert(from, to, n);
    }
    static void copy(const Half* from, float* to, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
        convert(from + i, to + i, n - i);
    }
    static void copy(const float* from, Half* to, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        convert(from + i, to + i, n - i);
    }
    static float absmax(const float* x, int64_t n) { return largest_magnitude(x, n); }
    // Scalar look-ups: gather instructions have been made slow by microcode on many CPUs.
    static void decode(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        const float* map = codes.map;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            uint64_t word;
            std::memcpy(&word, q + i, 8);
            __m128 four[2];
            for (__m128& values : four) {
                const float a = map[word & 255], b = map[word >> 8 & 255];
                next_codes(word);
                values = _mm_setr_ps(a, b, map[word & 255], map[word >> 8 & 255]);
                next_codes(word);
            }
            _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_set_m128(four[1], four[0]), _mm256_set1_ps(absmax)));
        }
        Scalar::decode(codes, q + i, absmax, x + i, n - i);
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        codes.sign ? encode32<true>(codes, x, factor, q, n) : encode32<false>(codes, x, factor, q, n);
        const int64_t whole = n / 32 * 32;
        if (whole < n) Scalar::encode(codes, x + whole, factor, q + whole, n - whole);
    }

  private:
    // Hidden from the compiler, which would shift the whole word anew for every code.
    static void next_codes(uint64_t& word) {
        word >>= 16;
        asm("" : "+r"(word));
    }

    // See StateCodes::Regions. On the signed map the arithmetic gives minus the distance from zero's code, so that
    // saturation cuts 128, which the negative side does not have.
    template <bool sign>
    static void encode32(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        using Regions = StateCodes::Regions;
        const Regions& regions = codes.regions;
        auto load = [](const auto* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
        const __m256i shifts =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(regions.shift)));
        const __m256i nexts = load(regions.next), one = _mm256_set1_epi32(Regions::one);
        const __m256 slopes = _mm256_loadu_ps(regions.slope), offset = _mm256_set1_ps(Regions::offset);
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), lowest = _mm256_set1_epi32(StateCodes::lowest);
        const __m256i below_two = _mm256_set1_epi32(Regions::below_two);
        const __m256 scale = _mm256_set1_ps(sign ? -factor : factor);
        for (int64_t i = 0; i + 32 <= n; i += 32) {
            // Step by step over four registers: the chain of one is too long to leave its overlap to the processor.
            __m256i y[4], a[4], shift[4], rank[4], nearest = _mm256_set1_epi32(-1);
            for (int r = 0; r < 4; ++r) {
                y[r] = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * r), scale));
                a[r] = _mm256_max_epi32(sign ? _mm256_and_si256(y[r], magnitude) : y[r], lowest);
            }
            for (int r = 0; r < 4; ++r) shift[r] = _mm256_shuffle_epi8(shifts, _mm256_srli_epi32(a[r], 24));
            for (int r = 0; r < 4; ++r) {
                const __m256i next = _mm256_permutevar8x32_epi32(nexts, shift[r]);
                shift[r] = _mm256_add_epi32(shift[r], _mm256_cmpgt_epi32(a[r], next));
            }
            for (int r = 0; r < 4; ++r) {
                const __m256 slope = _mm256_permutevar8x32_ps(slopes, shift[r]);
                rank[r] = _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(a[r]), slope, offset));
                nearest = _mm256_min_epu16(nearest, rank[r]);
            }
            for (int r = 0; r < 4; ++r) {
                rank[r] = _mm256_sub_epi32(_mm256_min_epi32(rank[r], below_two), one);
                rank[r] = _mm256_srlv_epi32(rank[r], shift[r]);
                if (sign) rank[r] = _mm256_sign_epi32(rank[r], y[r]);
            }
            __m256i low = _mm256_packs_epi32(rank[0], rank[1]), high = _mm256_packs_epi32(rank[2], rank[3]), code;
            if (sign) {
                code = _mm256_packs_epi16(low, high);
            } else {
                const __m256i first = _mm256_set1_epi16(1);
                code = _mm256_packus_epi16(_mm256_sub_epi16(low, first), _mm256_sub_epi16(high, first));
            }
            // Packing works in 128-bit lanes; the permutation puts the groups of four back in order.
            code = _mm256_permutevar8x32_epi32(code, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            if (sign) code = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(codes.zero)), code);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), code);
            // Too near a midpoint to tell by arithmetic: about one value in eight thousand.
            const __m256i fraction = _mm256_and_si256(nearest, _mm256_set1_epi32(0xffff));
            const __m256i unsure = _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * Regions::margin), fraction);
            for (unsigned left = _mm256_movemask_ps(_mm256_castsi256_ps(unsure)); left; left &= left - 1)
                for (int64_t at = i + __builtin_ctz(left), r = 0; r < 4; ++r, at += 8) q[at] = codes(x[at] * factor);
        }
    }
};
PYQLORA_TARGET_END

PYQLORA_TARGET(PYQLORA_AVX512)
struct Avx512 : Avx2 {
    template <Update what, class Rule>
    static void apply(const Rule& rule, float size, const float* g, const float* p, float* to, float* const* s,
                      int64_t n, float* before = nullptr, uint32_t* largest = nullptr) {
        apply_rule<what>(rule, size, g, p, to, s, n, before, largest);
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
#endif

}  // namespace
}  // namespace pyqlora::cpu
