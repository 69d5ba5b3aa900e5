#include "ops/rotary.h"

#include <algorithm>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"

namespace pyqlora::cpu {
namespace {

// Of a position. y₀ = x₀ · cos₀ - x₁ · sin₀ and y₁ = x₁ · cos₁ + x₀ · sin₁ for the halves of a head; on the way back
// each half was multiplied by the sine of the other, and the signs change places.
template <class T>
struct Angle {
    const T *cos, *sin0, *sin1;
    float sign;

    Angle(const T* cos, const T* sin, int64_t half, bool backward)
        : cos(cos), sin0(backward ? sin + half : sin), sin1(backward ? sin : sin + half), sign(backward ? -1 : 1) {}
};

// Of each half, elements from `first` on.
template <class T>
void rotate_rest(const T* x, const Angle<T>& a, int64_t half, int64_t first, T* y) {
    const auto product = [](T value, T factor, float sign) {
        return to_float(from_float<T>(to_float(value) * (sign * to_float(factor))));
    };
    for (int64_t i = first; i < half; ++i) {
        const T x0 = x[i], x1 = x[half + i];
        y[i] = from_float<T>(product(x0, a.cos[i], 1) + product(x1, a.sin0[i], -a.sign));
        y[half + i] = from_float<T>(product(x1, a.cos[half + i], 1) + product(x0, a.sin1[i], a.sign));
    }
}

}  // namespace

namespace scalar {
namespace {

template <class T>
void rotate(const T* x, const Angle<T>& a, int64_t half, T* y) {
    rotate_rest(x, a, half, 0, y);
}

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/rotary_simd.inl"
#include "core/each_isa.inl"

void rotary(const RotaryArgs& a, int threads) {
    const int64_t dim = a.dim, half = dim / 2, width = a.heads * dim, positions = a.cos.numel / dim;
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto rotate = PYQLORA_SELECT(rotate<T>);
        parallel_for(threads, a.x.numel / width, std::max<int64_t>(1, (1 << 14) / width),
                     [&](int64_t row, int64_t end) {
                         for (; row < end; ++row) {
                             const int64_t at = row % positions * dim;
                             const Angle<T> angle(a.cos.as<T>() + at, a.sin.as<T>() + at, half, a.backward);
                             for (int64_t i = row * width; i < (row + 1) * width; i += dim)
                                 rotate(a.x.as<T>() + i, angle, half, a.y.as<T>() + i);
                         }
                     });
    });
}

}  // namespace pyqlora::cpu
