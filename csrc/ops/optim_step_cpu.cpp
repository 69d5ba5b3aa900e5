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
#include "ops/optim_step_avx512.h"
#include "ops/optim_step_simd.h"

namespace pyqlora::cpu {
namespace {

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
            for (int64_t c = first; c < last; ++c)
                a_.quantized() ? step8(chunks[c], chunks[std::min(c + 1, last - 1)]) : step32(chunks[c]);
        });
    }

  private:
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

    // Blocks of floats as they are, others in `buffer`.
    template <class X>  // T or const T
    static auto* floats(X* x, float* buffer, int64_t n) {
        if constexpr (std::is_same_v<T, float>) {
            return x;
        } else {
            Isa::copy(x, buffer, n);
            return buffer;
        }
    }

    template <class X>
    static void prefetch(const X* x, int64_t n) {
        for (int64_t i = 0; i < n; i += 64 / sizeof(X)) __builtin_prefetch(x + i);
    }

    // `next` is the chunk after this one. While a block is stepped, the memory of the block after it is fetched, a part
    // at a time: a processor that has many lines under way waits for them.
    void step8(const Chunk& c, const Chunk& next) const {
        T* p = a_.params[c.tensor].template as<T>();
        const T* g = a_.grads[c.tensor].template as<T>();
        for (int64_t i = c.begin; i < c.end; i += kStateBlock) {
            alignas(64) float gradient[kStateBlock], parameter[kStateBlock];
            Attempt attempt;
            const int64_t n = std::min(kStateBlock, c.end - i);
            Coded coded[Rule::states];
            for (int k = 0; k < Rule::states; ++k)
                coded[k] = {codes_[k], state<uint8_t>(c.tensor, k, i), *absmax(c.tensor, k, i / kStateBlock)};
            const Chunk& ahead = i + n < c.end ? c : next;
            const int64_t at = i + n < c.end ? i + n : next.begin, size = std::min(kStateBlock, ahead.end - at);
            for (int k = 0; k < Rule::states; ++k) {
                prefetch(state<uint8_t>(ahead.tensor, k, at), size);
                prefetch(absmax(ahead.tensor, k, at / kStateBlock), 1);
            }
            prefetch(a_.grads[ahead.tensor].template as<T>() + at, size);
            const float* gs = floats(g + i, gradient, n);
            float* ps = floats(p + i, parameter, n);
            const Rule& rule = rules_[c.tensor];
            Isa::attempt(rule, rule.size, coded, gs, ps, attempt, n);
            float* const s[3] = {attempt.states[0], attempt.states[1], attempt.states[2]};
            uint32_t* largest = attempt.largest;
            if (*std::max_element(largest, largest + 3) > largest_finite) {
                for (int k = 0; k < Rule::states; ++k)
                    Isa::decode(*coded[k].codes, coded[k].q, coded[k].absmax, s[k], n);
                Isa::template apply<Update::step>(rule, rule.size, gs, attempt.before, ps, s, n);
                for (int k = 0; k < Rule::states; ++k) largest[k] = bit_cast<uint32_t>(Isa::absmax(s[k], n));
            }
            if constexpr (!std::is_same_v<T, float>) Isa::copy(ps, p + i, n);
            const int64_t share = ceil_div(size, Rule::states);
            for (int k = 0; k < Rule::states; ++k) {
                prefetch(a_.params[ahead.tensor].template as<T>() + at + k * share, share);
                const auto top = bit_cast<float>(largest[k]);
                *absmax(c.tensor, k, i / kStateBlock) = top;
                // A block too small for a normal reciprocal is stored as zeros.
                const float factor = top >= std::numeric_limits<float>::min() ? 1.0f / top : 0.0f;
                Isa::encode(*codes_[k], s[k], factor, state<uint8_t>(c.tensor, k, i), n);
            }
        }
    }

    void step32(const Chunk& c) const {
        const Rule& rule = rules_[c.tensor];
        T* p = a_.params[c.tensor].template as<T>();
        const T* g = a_.grads[c.tensor].template as<T>();
        for (int64_t i = c.begin; i < c.end; i += kStateBlock) {
            alignas(64) float gradient[kStateBlock], parameter[kStateBlock];
            const int64_t n = std::min(kStateBlock, c.end - i);
            float* s[3];
            states32(c.tensor, i, s);
            const float *gs = floats(g + i, gradient, n), *ps = floats(p + i, parameter, n);
            if constexpr (std::is_same_v<T, float>) {
                Isa::template apply<Update::step>(rule, rule.size, gs, ps, p + i, s, n);
            } else {
                Isa::template apply<Update::step>(rule, rule.size, gs, ps, parameter, s, n);
                Isa::copy(parameter, p + i, n);
            }
        }
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
                Isa::template apply<Update::direction>(rules_[c.tensor], 0.0f, gradient, u, u, s, n);
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

// The tables of a map, which take longer to build than some steps take: those of the last one are kept.
const StateCodes& codes_of(const float* map, bool sign) {
    thread_local std::optional<StateCodes> kept[2];
    std::optional<StateCodes>& codes = kept[sign];
    if (!codes || !std::equal(map, map + 256, codes->map)) codes.emplace(map, sign);
    return *codes;
}

template <class Isa>
void step(const OptimStepArgs& a, int threads) {
    const StateCodes* codes1 = a.quantized() ? &codes_of(a.qmap1.as<float>(), true) : nullptr;
    const StateCodes* codes2 = a.qmap2.defined() ? &codes_of(a.qmap2.as<float>(), false) : nullptr;
    if (a.params.empty()) return;
    dispatch_rule(a.rule, [&](auto rule) {
        dispatch_float<Half, BFloat16>(a.params[0].dtype, [&](auto type) {
            using Rule = typename decltype(rule)::type;
            Step<Isa, Rule, typename decltype(type)::type>(a, codes1, codes2).run(threads);
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
