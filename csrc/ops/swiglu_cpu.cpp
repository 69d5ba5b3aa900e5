#include "ops/swiglu.h"

#include <algorithm>
#include <cmath>

#include "core/cpu_features.h"
#include "core/flat.h"
#include "core/float16.h"
#include "core/parallel.h"

namespace pyqlora::cpu {

namespace scalar {
namespace {
#include "ops/swiglu_simd.inl"
}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/swiglu_simd.inl"
#include "core/each_isa.inl"

namespace {

constexpr int64_t kPiece = 1024;     // elements, in the first cache
constexpr int64_t kGrain = 1 << 14;  // elements, worth waking a thread for

}  // namespace

void swiglu(const SwigluArgs& a, int threads) {
    const auto decays = PYQLORA_SELECT(decays);
    const auto gated = PYQLORA_SELECT(gated);
    const Reader gate(a.gate), up(a.up);
    const Writer y(a.y);
    parallel_for(threads, a.gate.numel, kGrain, [&](int64_t first, int64_t end) {
        float buffers[3][kPiece];
        for (; first < end; first += kPiece) {
            const int64_t count = std::min(kPiece, end - first);
            const float* const g = gate.at(first, count, buffers[0]);
            const float* const u = up.at(first, count, buffers[1]);
            float* const out = y.at(first, buffers[2]);
            decays(g, count, out);
            gated(g, u, count, out);
            y.done(first, count, out);
        }
    });
}

void swiglu_backward(const SwigluBackwardArgs& a, int threads) {
    const auto decays = PYQLORA_SELECT(decays);
    const auto gradients = PYQLORA_SELECT(gated_gradients);
    const Reader gate(a.gate), up(a.up), dy(a.dy);
    const Writer dgate(a.dgate), dup(a.dup);
    parallel_for(threads, a.gate.numel, kGrain, [&](int64_t first, int64_t end) {
        float buffers[5][kPiece];
        for (; first < end; first += kPiece) {
            const int64_t count = std::min(kPiece, end - first);
            const float* const g = gate.at(first, count, buffers[0]);
            const float* const u = up.at(first, count, buffers[1]);
            const float* const d = dy.at(first, count, buffers[2]);
            float *const dg = dgate.at(first, buffers[3]), *const du = dup.at(first, buffers[4]);
            decays(g, count, dg);
            gradients(g, u, d, count, dg, du);
            dgate.done(first, count, dg);
            dup.done(first, count, du);
        }
    });
}

}  // namespace pyqlora::cpu
