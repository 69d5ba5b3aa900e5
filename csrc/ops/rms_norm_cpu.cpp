#include "ops/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/cpu_features.h"
#include "core/flat.h"
#include "core/float16.h"
#include "core/parallel.h"

namespace pyqlora::cpu {

namespace scalar {
namespace {
#include "ops/rms_norm_simd.inl"
}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/rms_norm_simd.inl"
#include "core/each_isa.inl"

namespace {

int64_t grain(int64_t dim) { return std::max<int64_t>(1, (1 << 14) / dim); }  // rows, worth waking a thread for

}  // namespace

void rms_norm(const RmsNormArgs& a, int threads) {
    const int64_t dim = a.dim();
    const auto inner = PYQLORA_SELECT(inner);
    const auto scale_row = PYQLORA_SELECT(scale_row);
    const auto multiply_row = PYQLORA_SELECT(multiply_row);
    const Reader x(a.x);
    const Writer y(a.y);
    std::vector<float> memory(dim);
    const float* const weight = Reader(a.weight).at(0, dim, memory.data());
    parallel_for(threads, a.rstd.numel, grain(dim), [&](int64_t row, int64_t end) {
        std::vector<float> buffers(2 * dim), rounding(dim);
        // x / √… in the dtype of x, which a float32 one has already.
        const TensorRef rounded{rounding.data(), dim, a.x.dtype, Device::cpu};
        const Reader read(rounded);
        const Writer round(rounded);
        for (; row < end; ++row) {
            const float* const v = x.at(row * dim, dim, buffers.data());
            const float rstd = 1.0f / std::sqrt(inner(v, v, dim) / static_cast<float>(dim) + static_cast<float>(a.eps));
            a.rstd.as<float>()[row] = rstd;
            float* const out = y.at(row * dim, buffers.data() + dim);
            scale_row(v, dim, rstd, out);
            if (a.x.dtype != DType::f32) {
                round.done(0, dim, out);
                read.at(0, dim, out);
            }
            multiply_row(weight, dim, out);
            y.done(row * dim, dim, out);
        }
    });
}

void rms_norm_backward(const RmsNormBackwardArgs& a, int threads) {
    const int64_t dim = a.dim();
    const auto gradient = PYQLORA_SELECT(normalized_gradient);
    const Reader x(a.x), dy(a.dy);
    const Writer dx(a.dx);
    std::vector<float> memory(dim);
    const float* const weight = Reader(a.weight).at(0, dim, memory.data());
    parallel_for(threads, a.rstd.numel, grain(dim), [&](int64_t row, int64_t end) {
        std::vector<float> buffers(4 * dim);
        float* const b = buffers.data();
        for (; row < end; ++row) {
            const float* const v = x.at(row * dim, dim, b);
            const float* const g = dy.at(row * dim, dim, b + dim);
            float* const out = dx.at(row * dim, b + 2 * dim);
            gradient(v, dim, a.rstd.as<float>()[row], weight, g, b + 3 * dim, out);
            dx.done(row * dim, dim, out);
        }
    });
}

}  // namespace pyqlora::cpu
