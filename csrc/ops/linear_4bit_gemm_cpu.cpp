#include "ops/linear_4bit_gemm.h"

#include <algorithm>

#include "core/dispatch.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"

namespace pyqlora::cpu {

namespace scalar {
namespace {

template <class Q>
constexpr std::nullptr_t pack_transposed = nullptr;
template <class Q>
constexpr std::nullptr_t pack_straight = nullptr;

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/linear_4bit_gemm.inl"
#include "core/each_isa.inl"

namespace {

using PackWeight = void (*)(const Weight&, const Slab&, float*);

Lines decoded_rows(const Weight& w) {
    return {[w](int64_t row, int64_t first, int64_t count, float* out) {
        const int64_t begin = row * w.k + first;
        decode_4bit(w.packed, w.scale, w.type, w.blocksize, begin, begin + count, out);
    }};
}

}  // namespace

Pack columns_of_transposed(const Weight& w) {
    PackWeight pack = nullptr;
    if (w.k % 32 == 0)
        dispatch_quant_type(w.type, [&](auto quant) { pack = PYQLORA_SELECT(pack_transposed<decltype(quant)>); });
    if (!pack) return pack_along(decoded_rows(w));
    return [=](const Slab& slab, float* out) { pack(w, slab, out); };
}

Pack columns_of(const Weight& w) {
    PackWeight pack = nullptr;
    if (w.k % 32 == 0)
        dispatch_quant_type(w.type, [&](auto quant) { pack = PYQLORA_SELECT(pack_straight<decltype(quant)>); });
    if (!pack) return pack_across(decoded_rows(w));
    return [=](const Slab& slab, float* out) { pack(w, slab, out); };
}

}  // namespace pyqlora::cpu
