#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
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

// One loop for every rule and instruction set: the compiler vectorizes it in each of the functions that inline it.
// With `only_direction` it leaves the states alone and puts u in the place of p.
template <bool only_direction, class Rule>
[[gnu::always_inline]] inline void apply_rule(const Rule& rule, float size, const float* g, float* p, float* s0,
                                              float* s1, float* s2, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        float* const at[3] = {s0 + i, s1 + i, s2 + i};
        float s[Rule::states];
        for (int k = 0; k < Rule::states; ++k) s[k] = *at[k];
        const float gradient = Rule::coupled ? fmaf(rule.weight_decay, p[i], g[i]) : g[i];
        const float u = rule.update(gradient, s), updated = fmaf(-size, u, p[i] * rule.decay);
        uint32_t unfinite = 0;
        for (int k = 0; k < Rule::states; ++k) unfinite |= (bit_cast<uint32_t>(s[k]) & 0x7fffffffu) > 0x7f7fffffu;
        const uint32_t keep = 0u - unfinite;
        if constexpr (only_direction) {
            p[i] = select(keep, 0.0f, u);
        } else {
            p[i] = select(keep, p[i], updated);
            for (int k = 0; k < Rule::states; ++k) *at[k] = select(keep, *at[k], s[k]);
        }
    }
}

[[gnu::always_inline]] inline float largest_magnitude(const float* x, int64_t n) {
    uint32_t largest = 0;  // magnitudes sort like their bits
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    return bit_cast<float>(largest);
}

template <class From, class To>
[[gnu::always_inline]] inline void convert(const From* from, To* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<To>(to_float(from[i]));
}

struct Scalar {
    template <bool only_direction = false, class Rule>
    static void apply(const Rule& rule, float size, const float* g, float* p, float* const* s, int64_t n) {
        apply_rule<only_direction>(rule, size, g, p, s[0], s[1], s[2], n);
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
    // index[i] = table[index[i]]. Never as gather instructions, which microcode has made slow on many CPUs.
    [[gnu::noinline]] static void look_up(const uint32_t* table, uint32_t* index, int64_t n) {
        for (int64_t i = 0; i < n; ++i) index[i] = table[index[i]];
    }
};

#if defined(PYQLORA_X86)
PYQLORA_TARGET(PYQLORA_AVX2)
struct Avx2 {
    template <bool only_direction = false, class Rule>
    static void apply(const Rule& rule, float size, const float* g, float* p, float* const* s, int64_t n) {
        apply_rule<only_direction>(rule, size, g, p, s[0], s[1], s[2], n);
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
        const float* map = codes.map;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            const __m256 value = _mm256_setr_ps(map[q[i]], map[q[i + 1]], map[q[i + 2]], map[q[i + 3]], map[q[i + 4]],
                                                map[q[i + 5]], map[q[i + 6]], map[q[i + 7]]);
            _mm256_storeu_ps(x + i, _mm256_mul_ps(value, _mm256_set1_ps(absmax)));
        }
        Scalar::decode(codes, q + i, absmax, x + i, n - i);
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), lowest = _mm256_set1_epi32(StateCodes::lowest);
        const __m256i highest = _mm256_set1_epi32(StateCodes::highest);
        const __m256i mask = _mm256_set1_epi32((1 << codes.shift) - 1);
        const __m256i negative_table = _mm256_set1_epi32(codes.sign ? codes.buckets : 0);
        const __m128i shift = _mm_cvtsi32_si128(codes.shift);
        alignas(32) uint32_t entry[kStateBlock], low[kStateBlock];
        auto at = [](uint32_t* x) { return reinterpret_cast<__m256i*>(x); };
        const int64_t whole = n / 8 * 8;
        for (int64_t i = 0; i < whole; i += 8) {
            const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(factor));
            const __m256i bits = _mm256_castps_si256(y);
            __m256i a = _mm256_max_epi32(_mm256_and_si256(bits, magnitude), lowest);
            a = _mm256_sub_epi32(_mm256_min_epi32(a, highest), lowest);
            const __m256i negative = codes.sign ? _mm256_srai_epi32(bits, 31) : _mm256_setzero_si256();
            const __m256i bucket = _mm256_srl_epi32(a, shift), offset = _mm256_and_si256(negative, negative_table);
            _mm256_store_si256(at(entry + i), _mm256_add_epi32(bucket, offset));
            _mm256_store_si256(at(low + i), _mm256_and_si256(_mm256_xor_si256(a, negative), mask));
        }
        Scalar::look_up(codes.table.data(), entry, whole);
        for (int64_t i = 0; i < whole; i += 8) {
            const __m256i sum = _mm256_add_epi32(_mm256_load_si256(at(entry + i)), _mm256_load_si256(at(low + i)));
            const __m256i code = _mm256_srl_epi32(sum, shift);
            const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packus_epi16(words, words));
        }
        Scalar::encode(codes, x + whole, factor, q + whole, n - whole);
    }
};
PYQLORA_TARGET_END

PYQLORA_TARGET(PYQLORA_AVX512)
struct Avx512 : Avx2 {
    template <bool only_direction = false, class Rule>
    static void apply(const Rule& rule, float size, const float* g, float* p, float* const* s, int64_t n) {
        apply_rule<only_direction>(rule, size, g, p, s[0], s[1], s[2], n);
    }
    // The map lies in 16 registers: eight look-ups by the low five bits, then the choice among them by the high three.
    static void decode(const StateCodes& codes, const uint8_t* q, float absmax, float* x, int64_t n) {
        __m512 map[16];
        for (int r = 0; r < 16; ++r) map[r] = _mm512_loadu_ps(codes.map + 16 * r);
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
            __m512 value[8];
            for (int r = 0; r < 8; ++r) value[r] = _mm512_permutex2var_ps(map[2 * r], code, map[2 * r + 1]);
            for (int half = 4, bit = 128; half > 0; half /= 2, bit /= 2) {
                const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
                for (int r = 0; r < half; ++r) value[r] = _mm512_mask_blend_ps(upper, value[r], value[r + half]);
            }
            _mm512_storeu_ps(x + i, _mm512_mul_ps(value[0], _mm512_set1_ps(absmax)));
        }
        Scalar::decode(codes, q + i, absmax, x + i, n - i);
    }
    static void encode(const StateCodes& codes, const float* x, float factor, uint8_t* q, int64_t n) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), fraction = _mm512_set1_epi32(0x7fffff);
        const __m512i lowest = _mm512_set1_epi32(StateCodes::lowest), highest = _mm512_set1_epi32(StateCodes::highest);
        const auto& decades = codes.decades;
        const __m512i region0 = _mm512_loadu_si512(decades.region), region1 = _mm512_loadu_si512(decades.region + 16);
        const __m512 slopes = _mm512_loadu_ps(decades.slope), starts = _mm512_loadu_ps(decades.start);
        const __m512 lasts = _mm512_loadu_ps(decades.last), margin = _mm512_set1_ps(StateCodes::Decades::margin);
        const __m512i zero = _mm512_set1_epi32(codes.zero);
        const __mmask16 has_sign = codes.sign ? 0xffff : 0;
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
            const __m512i a = _mm512_min_epi32(_mm512_max_epi32(_mm512_and_si512(bits, magnitude), lowest), highest);
            const __m512i entry = _mm512_permutex2var_epi32(region0, _mm512_srli_epi32(a, 23), region1);
            const __m512i sum = _mm512_add_epi32(entry, _mm512_and_si512(a, fraction));
            const __m512i region = _mm512_srli_epi32(sum, 23);
            const __m512 t = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_permutexvar_ps(region, slopes),
                                             _mm512_permutexvar_ps(region, starts));
            const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(t, _mm512_roundscale_ps(t, 0)));
            __m512i rank = _mm512_cvttps_epi32(_mm512_min_ps(t, _mm512_permutexvar_ps(region, lasts)));
            const __mmask16 negative = _mm512_movepi32_mask(bits) & has_sign;
            rank = _mm512_mask_min_epi32(rank, negative, rank, zero);
            const __m512i code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, rank), negative, zero, rank);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(code));
            // Too near a midpoint to tell by arithmetic: about one value in two thousand.
            const __mmask16 split = _mm512_cmpeq_epi32_mask(_mm512_and_si512(sum, fraction), fraction);
            for (unsigned left = _mm512_cmplt_ps_mask(distance, margin) | split; left; left &= left - 1) {
                const int lane = __builtin_ctz(left);
                q[i + lane] = codes(x[i + lane] * factor);
            }
        }
        Scalar::encode(codes, x + i, factor, q + i, n - i);
    }
};
PYQLORA_TARGET_END
#endif

// What one thread does at a time: a run of elements of one tensor, a whole number of blocks but for the last.
struct Chunk {
    size_t tensor;
    int64_t begin, end;
};
constexpr int64_t kChunk = 64 * kStateBlock;
static_assert(kChunk % kNormChunk == 0);

// A sum in the order that optim_step.h lays down.
struct Lanes {
    double at[32] = {};

    void add_squares(const float* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) at[i / 8] += static_cast<double>(x[i]) * x[i];
    }
    double sum() {
        for (int half = 16; half; half /= 2) {
            for (int l = 0; l < half; ++l) at[l] += at[l + half];
        }
        return at[0];
    }
};

template <class Isa, class Rule, class T>
class Step {
  public:
    Step(const OptimStepArgs& a, const StateCodes* codes1, const StateCodes* codes2)
        : a_(a), codes_{codes1, Rule::signed_states > 1 ? codes1 : codes2, codes2} {}

    void run(int threads) {
        std::vector<Chunk> chunks;
        for (size_t t = 0; t < a_.params.size(); ++t) {
            rules_.emplace_back(a_.hyper, a_.steps[t]);
            for (int64_t i = 0; i < a_.params[t].numel; i += kChunk)
                chunks.push_back({t, i, std::min(i + kChunk, a_.params[t].numel)});
        }
        if (a_.max_unorm > 0) hold_update_norms(chunks, threads);
        parallel_for(threads, chunks.size(), 1, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c) a_.quantized() ? step8(chunks[c]) : step32(chunks[c]);
        });
    }

  private:
    static constexpr bool is_float = std::is_same_v<T, float>;

    // State k of a tensor from element i on.
    template <class S>
    S* state(size_t t, int k, int64_t i) const {
        if (k >= Rule::signed_states) return a_.state2[t].template as<S>() + i;
        return a_.state1[t].template as<S>() + k * a_.params[t].numel + i;
    }
    float* absmax(size_t t, int k, int64_t block) const {
        if (k >= Rule::signed_states) return a_.absmax2[t].template as<float>() + block;
        return a_.absmax1[t].template as<float>() + k * ((a_.params[t].numel + kStateBlock - 1) / kStateBlock) + block;
    }

    // Calls body(g, p, i, n) with up to a block of float gradients and parameters, and writes the parameters back.
    template <class Body>
    void for_blocks(const Chunk& c, Body body) const {
        T* p = a_.params[c.tensor].template as<T>();
        const T* g = a_.grads[c.tensor].template as<T>();
        for (int64_t i = c.begin; i < c.end; i += kStateBlock) {
            const int64_t n = std::min(kStateBlock, c.end - i);
            if constexpr (is_float) {
                body(g + i, p + i, i, n);
            } else {
                alignas(64) float gradient[kStateBlock], parameter[kStateBlock];
                Isa::copy(g + i, gradient, n);
                Isa::copy(p + i, parameter, n);
                body(gradient, parameter, i, n);
                Isa::copy(parameter, p + i, n);
            }
        }
    }

    void step8(const Chunk& c) const {
        const Rule& rule = rules_[c.tensor];
        for_blocks(c, [&](const float* g, float* p, int64_t i, int64_t n) {
            alignas(64) float values[Rule::states][kStateBlock];
            float* s[3] = {values[0], values[Rule::states > 1 ? 1 : 0], values[Rule::states - 1]};
            for (int k = 0; k < Rule::states; ++k)
                Isa::decode(*codes_[k], state<uint8_t>(c.tensor, k, i), *absmax(c.tensor, k, i / kStateBlock), s[k], n);
            Isa::apply(rule, rule.size, g, p, s, n);
            for (int k = 0; k < Rule::states; ++k) {
                const float largest = Isa::absmax(s[k], n);
                *absmax(c.tensor, k, i / kStateBlock) = largest;
                // A block too small for a normal reciprocal is stored as zeros.
                const float factor = largest >= std::numeric_limits<float>::min() ? 1.0f / largest : 0.0f;
                Isa::encode(*codes_[k], s[k], factor, state<uint8_t>(c.tensor, k, i), n);
            }
        });
    }

    void step32(const Chunk& c) const {
        const Rule& rule = rules_[c.tensor];
        for_blocks(c, [&](const float* g, float* p, int64_t i, int64_t n) {
            float* s[3];
            states32(c.tensor, i, s);
            Isa::apply(rule, rule.size, g, p, s, n);
        });
    }

    void states32(size_t t, int64_t i, float** s) const {
        for (int k = 0; k < 3; ++k) s[k] = state<float>(t, std::min(k, Rule::states - 1), i);
    }

    // Scales each tensor's step so that its update is no longer than max_unorm times its parameters.
    void hold_update_norms(const std::vector<Chunk>& chunks, int threads) {
        auto* norms = a_.workspace.template as<double>();  // |u|^2 and |p|^2 by chunk of kNormChunk
        std::vector<double*> first;                        // of each tensor
        for (const TensorRef& p : a_.params) {
            first.push_back(norms);
            norms += 2 * ceil_div(p.numel, kNormChunk);
        }
        parallel_for(threads, chunks.size(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) square_norms(chunks[c], first[chunks[c].tensor]);
        });
        for (size_t t = 0; t < rules_.size(); ++t) {
            Lanes update, parameter;
            for (int64_t c = 0; c < ceil_div(a_.params[t].numel, kNormChunk); ++c) {
                update.at[c % 32] += first[t][2 * c];
                parameter.at[c % 32] += first[t][2 * c + 1];
            }
            const double norm = std::sqrt(update.sum()), limit = a_.max_unorm * std::sqrt(parameter.sum());
            if (norm > limit) rules_[t].size = static_cast<float>(rules_[t].size * (limit / norm));
            *a_.unorm[t].template as<float>() = static_cast<float>(norm);
        }
    }

    void square_norms(const Chunk& c, double* norms) const {
        const T* p = a_.params[c.tensor].template as<T>();
        const T* g = a_.grads[c.tensor].template as<T>();
        for (int64_t begin = c.begin; begin < c.end; begin += kNormChunk) {
            const int64_t end = std::min(begin + kNormChunk, c.end);
            Lanes update, parameter;
            for (int64_t i = begin; i < end; i += kStateBlock) {
                alignas(64) float gradient[kStateBlock], u[kStateBlock];
                const int64_t n = std::min(kStateBlock, end - i);
                float* s[3];
                states32(c.tensor, i, s);
                Isa::copy(g + i, gradient, n);
                Isa::copy(p + i, u, n);
                parameter.add_squares(u, n);
                Isa::template apply<true>(rules_[c.tensor], 0.0f, gradient, u, s, n);
                update.add_squares(u, n);
            }
            norms[2 * (begin / kNormChunk)] = update.sum();
            norms[2 * (begin / kNormChunk) + 1] = parameter.sum();
        }
    }

    const OptimStepArgs& a_;
    const StateCodes* codes_[3];
    std::vector<Rule> rules_;
};

template <class Isa>
void step(const OptimStepArgs& a, int threads) {
    std::optional<StateCodes> codes1, codes2;
    if (a.quantized()) codes1.emplace(a.qmap1.as<float>(), true);
    if (a.qmap2.defined()) codes2.emplace(a.qmap2.as<float>(), false);
    if (a.params.empty()) return;
    dispatch_rule(a.rule, [&](auto rule) {
        dispatch_float<Half, BFloat16>(a.params[0].dtype, [&](auto type) {
            using Rule = typename decltype(rule)::type;
            Step<Isa, Rule, typename decltype(type)::type>(a, codes1 ? &*codes1 : nullptr, codes2 ? &*codes2 : nullptr)
                .run(threads);
        });
    });
}

}  // namespace

void optim_step(const OptimStepArgs& a, int threads) {
#if defined(PYQLORA_X86)
    if (active_isa() == Isa::avx512) return step<Avx512>(a, threads);
    if (active_isa() == Isa::avx2) return step<Avx2>(a, threads);
#endif
    step<Scalar>(a, threads);
}

}  // namespace pyqlora::cpu
