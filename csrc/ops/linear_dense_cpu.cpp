#include "ops/linear_dense.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "core/dispatch.h"
#include "core/flat.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"

namespace pyqlora::cpu {
namespace {

// Rows of W read side by side, far apart: the processor fetches each of them ahead by itself, but one alone not as fast
// as the memory gives.
constexpr int kLines = 4;

}  // namespace

namespace scalar {
namespace {

template <class T, int M>
void dot_lines(const float* x, int64_t k, const T* const* lines, float* y) {
    for (int m = 0; m < M; ++m, x += k)
        for (int line = 0; line < kLines; ++line) {
            float sum = 0;
            for (int64_t i = 0; i < k; ++i) sum += x[i] * to_float(lines[line][i]);
            *y++ = sum;
        }
}

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/linear_dense_simd.inl"
#include "core/each_isa.inl"

namespace {

template <class T, int M>
void few_rows(const LinearDenseArgs& a, const float* x, int threads) {
    const auto dot_lines = PYQLORA_SELECT(dot_lines<T, M>);
    const int64_t k = a.k, n = a.n();
    const T *const weight = a.weight.as<T>(), *const bias = a.bias.as<T>();
    parallel_for(threads, n, std::max<int64_t>(1, (1 << 18) / k), [&](int64_t first, int64_t end) {
        const int64_t apart = ceil_div(end - first, kLines);
        for (int64_t row = first; row < first + apart; ++row) {
            const T* lines[kLines];
            for (int i = 0; i < kLines; ++i) lines[i] = weight + std::min(row + i * apart, end - 1) * k;
            float y[M * kLines];
            dot_lines(x, k, lines, y);
            for (int i = 0; i < kLines && row + i * apart < end; ++i)
                for (int m = 0; m < M; ++m) {
                    const int64_t column = row + i * apart;
                    const float sum = y[m * kLines + i];
                    a.y.as<T>()[m * n + column] = from_float<T>(bias ? sum + to_float(bias[column]) : sum);
                }
        }
    });
}

}  // namespace

void linear_dense(const LinearDenseArgs& a, int threads) {
    std::vector<float> memory(a.x.numel);
    const float* const x = Reader(a.x).at(0, a.x.numel, memory.data());
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr void (*by_rows[])(const LinearDenseArgs&, const float*, int) = {few_rows<T, 1>, few_rows<T, 2>,
                                                                                  few_rows<T, 3>, few_rows<T, 4>};
        static_assert(std::size(by_rows) == LinearDenseArgs::max_rows);
        if (a.m()) by_rows[a.m() - 1](a, x, threads);
    });
}

}  // namespace pyqlora::cpu
