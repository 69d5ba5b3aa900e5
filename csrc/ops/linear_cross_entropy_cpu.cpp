#include "ops/linear_cross_entropy.h"

#include <algorithm>
#include <memory>

#include "core/gemm.h"

namespace pyqlora::cpu {
namespace {

// The matrix from this line and this element of each line on.
Lines window(const Lines& lines, int64_t line0, int64_t first0) {
    Lines part = lines;
    part.read = [=](int64_t line, int64_t first, int64_t count, float* out) {
        lines.read(line0 + line, first0 + first, count, out);
    };
    if (part.plain) part.plain += line0 * part.stride + first0;
    return part;
}

// From the beginning of a row to that of the next.
int64_t stride(const TensorRef& logits, int64_t n) { return logits.contiguous ? n : logits.stride; }

}  // namespace

void logits(const LogitsArgs& a, int threads) {
    const Term term{a.k, strips_along(rows_of(a.x, a.k)), pack_along(rows_of(a.weight, a.k)),
                    store_to(a.logits, stride(a.logits, a.n()))};
    multiply(a.m(), a.n(), {term}, threads);
}

void logits_backward(const LogitsBackwardArgs& a, int threads) {
    // The sum over the vocabulary in parts, whose packed dlogits stay in the cache.
    constexpr int64_t kPart = 4096;
    const int64_t m = a.m(), n = a.n(), k = a.k;
    const std::unique_ptr<float[]> sums(new float[m * k]());
    float* const sum = sums.get();
    const Then add = add_to({sum, m * k, DType::f32, Device::cpu}, k), store = store_to(a.dx, k);
    const Lines dlogits = rows_of(a.dlogits, stride(a.dlogits, n)), weight = rows_of(a.weight, k);
    for (int64_t first = 0; first < n; first += kPart) {
        const int64_t depth = std::min(kPart, n - first);
        const Term term{depth, strips_along(window(dlogits, 0, first)), pack_across(window(weight, first, 0)), add};
        multiply(m, k, {term}, threads);
    }
    for (int64_t row = 0; row < m; ++row) store.row(row, 0, k, sum + row * k);
}

}  // namespace pyqlora::cpu
