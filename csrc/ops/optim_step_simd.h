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

// The new p, and u, for an element's gradient and states.
template <class Rule>
[[gnu::always_inline]] inline float stepped(const Rule& rule, float size, float g, float p, float* s, float& u) {
    u = rule.update(Rule::coupled ? fmaf(rule.weight_decay, p, g) : g, s);
    return fmaf(-size, u, p * rule.decay);
}

// One loop for every rule and instruction set: the compiler vectorizes it in each of the functions that inline it.
// `to` may be `p`. The rule is a copy, whose constants no store can change: they stay in registers.
template <Update what, class Rule>
[[gnu::always_inline]] inline void apply_rule(const Rule rule, float size, const float* g, const float* p, float* to,
                                              float* const* states, int64_t n, float* before, uint32_t* largest) {
    float* const at[3] = {states[0], states[1], states[2]};
    uint32_t tops[Rule::states] = {};
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        float s[Rule::states], u;
        for (int k = 0; k < Rule::states; ++k) s[k] = at[k][i];
        const float updated = stepped(rule, size, g[i], p[i], s, u);
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

// States as they are stored.
struct Coded {
    const StateCodes* codes;
    const uint8_t* q;
    float absmax;
};

// What an attempt leaves beside the parameters of a block.
struct Attempt {
    alignas(64) float states[3][kStateBlock], before[kStateBlock];
    uint32_t largest[3] = {};
};

// Decodes the states of a block's elements from `begin` on, then attempts their update.
template <class Isa, class Rule>
void attempt_in_turn(const Rule& rule, float size, const Coded* coded, const float* g, float* p, Attempt& to, int64_t n,
                     int64_t begin = 0) {
    float* const s[3] = {to.states[0] + begin, to.states[1] + begin, to.states[2] + begin};
    for (int k = 0; k < Rule::states; ++k)
        Isa::decode(*coded[k].codes, coded[k].q + begin, coded[k].absmax, s[k], n - begin);
    Isa::template apply<Update::attempt>(rule, size, g + begin, p + begin, p + begin, s, n - begin, to.before + begin,
                                         to.largest);
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
    template <class Rule>
    static void attempt(const Rule& rule, float size, const Coded* coded, const float* g, float* p, Attempt& to,
                        int64_t n) {
        attempt_in_turn<Scalar>(rule, size, coded, g, p, to, n);
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

}  // namespace
}  // namespace pyqlora::cpu
