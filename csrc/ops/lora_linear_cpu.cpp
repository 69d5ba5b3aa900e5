#include <algorithm>
#include <memory>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "ops/lora_dropout_avx2.h"
#include "ops/lora_linear_cpu.h"

namespace pyqlora::cpu {

namespace scalar {
namespace {

template <class T>
void drop(const T* x, int64_t first, int64_t count, float scale, uint64_t seed, int64_t row, uint32_t threshold,
          float* out) {
    for (int64_t i = 0; i < count;) {
        uint32_t bits = kept(seed, row, (first + i) / 8, threshold);
        for (const int64_t stop = std::min(i + 8, count); i < stop; ++i, bits >>= 1)
            out[i] = bits & 1 ? to_float(x[i]) * scale : 0.0f;
    }
}

}  // namespace
}  // namespace scalar

#if PYQLORA_X86
namespace avx512 {
using avx2::drop;
}
#endif

namespace {

// The rows of a matrix, each value times `scale`, some dropped.
Lines dropped_rows(const TensorRef& matrix, int64_t columns, const Dropout& dropout, float scale = 1.0f) {
    if (!dropout.seed.defined()) return rows_of(matrix, columns, scale);
    const auto seed = static_cast<uint64_t>(*dropout.seed.as<int64_t>());
    const uint32_t threshold = dropout.threshold();
    Lines lines;
    dispatch_float<Half, BFloat16>(matrix.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto drop = PYQLORA_SELECT(drop<T>);
        lines.read = [=, x = matrix.as<T>()](int64_t row, int64_t first, int64_t count, float* out) {
            drop(x + row * columns + first, first, count, scale, seed, row, threshold, out);
        };
    });
    return lines;
}

// `then` after C was dropped.
Then after_dropout(const Dropout& dropout, Then then) {
    const OnRow drop = drop_in_place(dropout);
    if (!drop) return then;
    return OnRow([=, store = std::move(then.row)](int64_t row, int64_t first, int64_t count, float* c) {
        drop(row, first, count, c);
        store(row, first, count, c);
    });
}

// `then` that writes Cᵀ [columns of C, rows of C].
OnRow store_transposed_to(const TensorRef& matrix, int64_t rows) {
    OnRow store;
    dispatch_float<Half, BFloat16>(matrix.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        store = [=, y = matrix.as<T>()](int64_t row, int64_t first, int64_t count, float* c) {
            for (int64_t i = 0; i < count; ++i) y[(first + i) * rows + row] = from_float<T>(c[i]);
        };
    });
    return store;
}

}  // namespace

OnRow drop_in_place(const Dropout& dropout) {
    if (!dropout.seed.defined()) return {};
    const auto seed = static_cast<uint64_t>(*dropout.seed.as<int64_t>());
    const uint32_t threshold = dropout.threshold();
    const auto drop = PYQLORA_SELECT(drop<float>);
    return [=](int64_t row, int64_t first, int64_t count, float* c) {
        drop(c, first, count, 1.0f, seed, row, threshold, c);
    };
}

void lora_dropout(const LoraDropoutArgs& a, int threads) {
    const int64_t columns = a.columns, rows = a.x.numel / columns;
    const Lines lines = dropped_rows(a.x, columns, a.dropout);
    const OnRow store = store_to(a.y, columns).row;
    parallel_for(threads, rows, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t row, int64_t end) {
        constexpr int64_t kStep = 1024;
        float line[kStep];
        for (; row < end; ++row)
            for (int64_t i = 0; i < columns; i += kStep) {
                const int64_t count = std::min(kStep, columns - i);
                lines.read(row, i, count, line);
                store(row, i, count, line);
            }
    });
}

// lora_down of so few rows that packing A would take longer than the product.
void few_rows_down(const LoraDownArgs& a) {
    const int64_t m = a.m(), k = a.a.length, rank = a.columns();
    const TensorRef& factor = a.a.factors[0];
    const Lines rows = dropped_rows(a.x, k, a.dropout, a.scales[0]);
    const RowProducts products = row_products(factor.dtype);
    const std::unique_ptr<float[]> x(new float[k]);
    for (int64_t i = 0; i < m; ++i) {
        rows.read(i, 0, k, x.get());
        products(x.get(), factor.data, rank, k, a.s.as<float>() + i * rank);
    }
}

void lora_down(const LoraDownArgs& a, int threads) {
    constexpr int64_t kFewRows = 8;
    if (a.m() <= kFewRows) return few_rows_down(a);
    const int64_t k = a.a.length, rank = a.columns();
    const Term term{k, strips_along(dropped_rows(a.x, k, a.dropout, a.scales[0])),
                    pack_along(rows_of(a.a.factors[0], k)), store_to(a.s, rank)};
    multiply(a.m(), rank, {term}, threads);
}

void lora_up(const LoraUpArgs& a, int threads) {
    const int64_t n = a.b.length, rank = a.b.widest();
    const Then then = a.accumulate ? add_to(a.y, n) : store_to(a.y, n);
    const Term term{rank, strips_along(rows_of(a.s, rank)), pack_along(rows_of(a.b.factors[0], rank)),
                    after_dropout(a.dropout, then)};
    multiply(a.m(), n, {term}, threads);
}

void lora_backward(const LoraBackwardArgs& a, int threads) {
    const int64_t rank = a.rank(), m = a.m();
    if (a.b.defined()) {
        const Term ds{a.n, strips_along(rows_of(a.dy, a.n)),
                      pack_across(rows_of(a.b, rank, static_cast<float>(a.scale))), store_to(a.ds, rank)};
        multiply(m, rank, {ds}, threads);
    }
    const Then store = a.transposed ? store_transposed_to(a.db, a.n) : store_to(a.db, rank);
    const Strips dy = strips_across(dropped_rows(a.dy, a.n, a.dropout));
    multiply(a.n, rank, {{m, dy, pack_across(rows_of(a.s, rank)), store}}, threads);
}

}  // namespace pyqlora::cpu
