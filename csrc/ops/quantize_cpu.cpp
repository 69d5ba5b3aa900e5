#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "ops/quantize.h"

namespace pyqlora::cpu {
namespace {

// bitsandbytes' arithmetic: a full block is multiplied by the reciprocal of its absmax, a short last one is divided.
constexpr float kTiny = 1e-38f;

template <class Q>
uint8_t encode(float x) {
    int rank = 0;
    for (float bound : Q::bounds) rank += x > bound;
    return Q::order[rank];
}

float scale(const Scales& s, int64_t block) {
    if (!s.nested()) return s.absmax.as<float>()[block];
    const float value = s.nested_code.as<float>()[s.absmax.as<uint8_t>()[block]];
    return value * s.nested_absmax.as<float>()[block / s.nested_blocksize] + *s.offset.as<float>();
}

}  // namespace

void quantize_4bit(const Quantize4bitArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            using Q = decltype(quant);
            const T* x = a.x.as<T>();
            const int64_t n = a.x.numel, blocks = ceil_div(n, a.blocksize);
            parallel_for(threads, blocks, 16, [&](int64_t first, int64_t last) {
                for (int64_t b = first; b < last; ++b) {
                    const int64_t begin = b * a.blocksize, end = std::min(begin + a.blocksize, n);
                    const bool full = end - begin == a.blocksize;
                    float absmax = 0;
                    for (int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(to_float(x[i])));
                    const float divisor = std::max(absmax, kTiny), factor = 1.0f / divisor;
                    a.absmax.as<float>()[b] = full ? absmax : divisor;
                    auto code = [&](int64_t i) {
                        if (i >= n) return encode<Q>(0.0f);
                        const float v = to_float(x[i]);
                        return encode<Q>(std::clamp(full ? v * factor : v / divisor, -1.0f, 1.0f));
                    };
                    for (int64_t i = begin; i < end; i += 2) a.packed.as<uint8_t>()[i / 2] = code(i) << 4 | code(i + 1);
                }
            });
        });
    });
}

void dequantize_4bit(const Dequantize4bitArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            using Q = decltype(quant);
            parallel_for(threads, a.out.numel, 4096, [&](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) {
                    const int64_t e = a.first + i;
                    const uint8_t byte = a.packed.as<uint8_t>()[e / 2];
                    const float value = Q::values[e & 1 ? byte & 15 : byte >> 4];
                    a.out.as<T>()[i] = from_float<T>(value * scale(a.scales, e / a.blocksize));
                }
            });
        });
    });
}

void quantize_blockwise(const QuantizeBlockwiseArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* x = a.x.as<T>();
        const float* code = a.code.as<float>();
        const int64_t n = a.x.numel;
        parallel_for(threads, ceil_div(n, a.blocksize), 4, [&](int64_t first, int64_t last) {
            for (int64_t b = first; b < last; ++b) {
                const int64_t begin = b * a.blocksize, end = std::min(begin + a.blocksize, n);
                float absmax = 0;
                for (int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(to_float(x[i])));
                a.absmax.as<float>()[b] = absmax;
                const float factor = absmax > 0 ? 1.0f / absmax : 0.0f;
                for (int64_t i = begin; i < end; ++i) {
                    const float v = to_float(x[i]) * factor;
                    int k = static_cast<int>(std::lower_bound(code, code + 256, v) - code);
                    if (k == 256 || (k > 0 && v - code[k - 1] <= code[k] - v)) --k;
                    a.q.as<uint8_t>()[i] = static_cast<uint8_t>(k);
                }
            }
        });
    });
}

void dequantize_blockwise(const DequantizeBlockwiseArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(threads, a.q.numel, 4096, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const float value = a.code.as<float>()[a.q.as<uint8_t>()[i]];
                a.out.as<T>()[i] = from_float<T>(value * a.absmax.as<float>()[i / a.blocksize]);
            }
        });
    });
}

}  // namespace pyqlora::cpu
