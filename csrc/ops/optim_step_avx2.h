// optim_step's loops with AVX2; see optim_step_simd.h.
#pragma once
#include "core/cpu_features.h"
#if defined(PYQLORA_X86)
#include <immintrin.h>

#include <algorithm>

#include "ops/optim_step_simd.h"

namespace pyqlora::cpu {
namespace {

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
    static void decode(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        const __m256 scale = _mm256_set1_ps(absmax);
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(decode8(codes.map, q + i), scale));
        Scalar::decode(codes, q + i, absmax, x + i, n - i);
    }
    // Eight elements at a time: the next eight are decoded while the update of these waits for its root and its
    // division. The compiler vectorizes the inner loop and keeps its arrays in registers.
    template <class Rule>
    static void attempt(const Rule& given, float size, const Coded* coded, const float* g, float* p, Attempt& to,
                        int64_t n) {
        constexpr int width = 8, states = Rule::states;
        const int64_t whole = n / width * width;
        // Copies, which no store can change: what they hold stays in registers.
        const Rule rule = given;
        const float* map[states];
        const uint8_t* q[states];
        __m256 scale[states], next[states];
        __m256i tops[states];
        for (int k = 0; k < states; ++k) {
            map[k] = coded[k].codes->map, q[k] = coded[k].q;
            scale[k] = _mm256_set1_ps(coded[k].absmax), tops[k] = _mm256_setzero_si256();
        }
        auto decode_next = [&](int64_t i) {
            for (int k = 0; k < states; ++k) next[k] = _mm256_mul_ps(decode8(map[k], q[k] + i), scale[k]);
        };
        if (whole) decode_next(0);
        for (int64_t i = 0; i < whole; i += width) {
            alignas(32) float state[states][width], gradient[width], from[width], updated[width];
            for (int k = 0; k < states; ++k) _mm256_store_ps(state[k], next[k]);
            _mm256_store_ps(gradient, _mm256_loadu_ps(g + i));
            _mm256_store_ps(from, _mm256_loadu_ps(p + i));
            if (i + width < whole) decode_next(i + width);
            for (int j = 0; j < width; ++j) {
                float values[states], u;
                for (int k = 0; k < states; ++k) values[k] = state[k][j];
                updated[j] = stepped(rule, size, gradient[j], from[j], values, u);
                for (int k = 0; k < states; ++k) state[k][j] = values[k];
            }
            _mm256_store_ps(to.before + i, _mm256_load_ps(from));
            _mm256_storeu_ps(p + i, _mm256_load_ps(updated));
            for (int k = 0; k < states; ++k) {
                const __m256 x = _mm256_load_ps(state[k]);
                _mm256_store_ps(to.states[k] + i, x);
                tops[k] =
                    _mm256_max_epu32(tops[k], _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
            }
        }
        attempt_in_turn<Scalar>(rule, size, coded, g, p, to, n, whole);
        for (int k = 0; k < states; ++k) {
            alignas(32) uint32_t top[width];
            _mm256_store_si256(reinterpret_cast<__m256i*>(top), tops[k]);
            to.largest[k] = std::max(to.largest[k], *std::max_element(top, top + width));
        }
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        codes.sign ? encode32<true>(codes, x, factor, q, n) : encode32<false>(codes, x, factor, q, n);
        const int64_t whole = n / 32 * 32;
        if (whole < n) Scalar::encode(codes, x + whole, factor, q + whole, n - whole);
    }

  private:
    // Scalar look-ups: gather instructions have been made slow by microcode on many CPUs. Each is an instruction for
    // the code and one that loads the float to its place.
    static __m256 decode8(const float* map, const uint8_t* q) {
        uint64_t codes;
        std::memcpy(&codes, q, 8);
        const __m128 low = decode4(map, codes);
        next_codes(codes);
        return _mm256_set_m128(decode4(map, codes), low);
    }
    static __m128 decode4(const float* map, uint64_t& codes) {
        __m128 x = _mm_set_ss(map[codes & 255]);
        x[1] = map[codes >> 8 & 255];
        next_codes(codes);
        x[2] = map[codes & 255];
        x[3] = map[codes >> 8 & 255];
        return x;
    }
    // A rotation goes to another register without a copy. Hidden from the compiler, which would shift the whole word
    // anew for every code; volatile, for it would mix the look-ups of two states and run out of registers.
    static void next_codes(uint64_t& codes) {
        codes = codes >> 16 | codes << 48;
        asm volatile("" : "+r"(codes));
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
            // Maybe too near a midpoint to tell by arithmetic: about one value in eight thousand.
            const __m256i fraction = _mm256_and_si256(nearest, _mm256_set1_epi32(0xffff));
            const __m256i unsure = _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * Regions::margin), fraction);
            if (_mm256_movemask_ps(_mm256_castsi256_ps(unsure))) look_up(codes, x + i, factor, q + i);
        }
    }

    // Looks up those of 32 values that are too near a midpoint. 16 bits of a fraction are as small in the middle of
    // most cells, where the map's own values lie: all states of a tensor without a gradient. The whole fraction tells
    // them apart.
    [[gnu::noinline]] static void look_up(const StateCodes& codes, const float* x, float factor, uint8_t* q) {
        using Regions = StateCodes::Regions;
        const Regions& regions = codes.regions;
        const __m256i shifts =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(regions.shift)));
        const __m256i nexts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(regions.next));
        for (int i = 0; i < 32; i += 8) {
            const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(factor));
            const __m256i a = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7fffffff)),
                                               _mm256_set1_epi32(StateCodes::lowest));
            __m256i shift = _mm256_shuffle_epi8(shifts, _mm256_srli_epi32(a, 24));
            shift = _mm256_add_epi32(shift, _mm256_cmpgt_epi32(a, _mm256_permutevar8x32_epi32(nexts, shift)));
            const __m256 slope = _mm256_permutevar8x32_ps(_mm256_loadu_ps(regions.slope), shift);
            const __m256i significand =
                _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(a), slope, _mm256_set1_ps(Regions::offset)));
            // From 2 up digits count double.
            shift = _mm256_add_epi32(shift, _mm256_cmpgt_epi32(significand, _mm256_set1_epi32(Regions::below_two)));
            const __m256i rank = _mm256_sllv_epi32(_mm256_set1_epi32(-1), shift);  // ones where the rank lies
            const __m256i unsure =
                _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * Regions::margin), _mm256_andnot_si256(rank, significand));
            for (unsigned left = _mm256_movemask_ps(_mm256_castsi256_ps(unsure)); left; left &= left - 1) {
                const int at = i + __builtin_ctz(left);
                q[at] = codes(x[at] * factor);
            }
        }
    }
};
PYQLORA_TARGET_END

}  // namespace
}  // namespace pyqlora::cpu
#endif
