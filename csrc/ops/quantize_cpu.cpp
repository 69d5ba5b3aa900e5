#include "ops/quantize_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"

namespace pyqlora::cpu {
namespace {

// bitsandbytes' arithmetic: a full block is multiplied by the reciprocal of its absmax, a short last one is divided.
// A NaN anywhere in a block makes its absmax NaN.
inline float divisor(float absmax) { return absmax < 1e-38f ? 1e-38f : absmax; }

template <class T>
float max_abs(const T* x, int64_t begin, int64_t end) {
    uint32_t bits = 0;  // of |x|: ordered like the floats, with NaN above infinity
    for (int64_t i = begin; i < end; ++i) bits = std::max(bits, bit_cast<uint32_t>(to_float(x[i])) & 0x7fffffffu);
    return bit_cast<float>(bits);
}

}  // namespace

namespace scalar {
namespace {

template <class Q>
uint8_t encode(float x) {
    int rank = 0;
    for (float bound : Q::bounds) rank += !(x <= bound);
    return Q::order[rank];
}

template <class T, class Q>
void quantize_blocks(const Quantize4bitArgs& a, int64_t first_block, int64_t last_block) {
    const T* x = a.x.as<T>();
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t begin = block * a.blocksize, end = std::min(begin + a.blocksize, a.x.numel);
        const bool full = end - begin == a.blocksize;
        const float absmax = max_abs(x, begin, end), d = divisor(absmax), factor = 1.0f / d;
        a.absmax.as<float>()[block] = full ? absmax : d;
        auto code = [&](int64_t i) {
            if (i >= end) return encode<Q>(0.0f);
            return encode<Q>(full ? to_float(x[i]) * factor : to_float(x[i]) / d);
        };
        for (int64_t i = begin; i < end; i += 2) a.packed.as<uint8_t>()[i / 2] = code(i) << 4 | code(i + 1);
    }
}

template <class T, class Q>
void decode(const uint8_t* packed, const BlockScale& scale, int64_t blocksize, int64_t begin, int64_t end, T* out,
            bool = false) {
    for (int64_t i = begin; i < end; ++i) {
        const float value = Q::values[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
        out[i - begin] = from_float<T>(value * scale(i / blocksize));
    }
}

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/quantize_simd.inl"
#include "core/each_isa.inl"

// From this many bytes an output is written past the caches.
constexpr int64_t kStreamBytes = 16 << 20;

void quantize_4bit(const Quantize4bitArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            using Q = decltype(quant);
            const auto kernel = PYQLORA_SELECT(quantize_blocks<T, Q>);
            parallel_for(threads, ceil_div(a.x.numel, a.blocksize), (1 << 16) / a.blocksize,
                         [&](int64_t first, int64_t last) { kernel(a, first, last); });
        });
    });
}

void dequantize_4bit(const Dequantize4bitArgs& a, int threads) {
    const BlockScale scale(a.scales);
    dispatch_float<Half, BFloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_quant_type(a.type, [&](auto quant) {
            using Q = decltype(quant);
            const auto kernel = PYQLORA_SELECT(decode<T, Q>);
            const bool stream = a.out.bytes() >= kStreamBytes;
            const Rows rows = a.out.rows();
            parallel_for(threads, a.out.numel, 1 << 17, [&](int64_t begin, int64_t last) {
                for (int64_t end; begin < last; begin = end) {
                    const int64_t row = begin / rows.columns, column = begin % rows.columns;
                    end = std::min(last, begin - column + rows.columns);
                    kernel(a.packed.as<uint8_t>(), scale, a.blocksize, a.first + begin, a.first + end,
                           a.out.as<T>() + row * rows.stride + column, stream);
                }
            });
        });
    });
}

void decode_4bit(const uint8_t* packed, const BlockScale& scale, QuantType type, int64_t blocksize, int64_t begin,
                 int64_t end, float* out) {
    dispatch_quant_type(type, [&](auto quant) {
        using Q = decltype(quant);
        PYQLORA_SELECT(decode<float, Q>)(packed, scale, blocksize, begin, end, out, false);
    });
}

// 8 bits. The nearest code, as bitsandbytes' CPU kernel finds it: x / absmax is first rounded to one of 65536 evenly
// spaced points of [-1, 1], and that point gets the number of midpoints between neighbouring codes that lie below it.
// (So 0 becomes the code of the point 1 / 65535.)
namespace {

constexpr int kPoints = 65536;

// The codes of points, one by one or of all in a row.
struct Nearest {
    explicit Nearest(const float* code) {
        for (int k = 0; k < 255; ++k) midpoints[k] = (code[k] + code[k + 1]) * 0.5f;
    }
    float midpoints[255];

    static float value(int point) { return static_cast<float>(2 * point) / 65535.0f - 1.0f; }
    uint8_t operator()(int point) const {
        return static_cast<uint8_t>(std::lower_bound(midpoints, midpoints + 255, value(point)) - midpoints);
    }
    std::vector<uint8_t> table() const {
        std::vector<uint8_t> codes(kPoints);
        int below = 0;
        for (int i = 0; i < kPoints; ++i) {
            while (below < 255 && midpoints[below] < value(i)) ++below;
            codes[i] = static_cast<uint8_t>(below);
        }
        return codes;
    }
};

inline int point(float x) {
    if (!(x == x)) return 0;
    const float unit = (std::clamp(x, -1.0f, 1.0f) + 1.0f) * 0.5f;
    return static_cast<int>(static_cast<float>(static_cast<double>(unit) * 65535.0 + 0.5));  // a fused multiply-add
}

// f maps a point to its code.
template <class T, class F>
void quantize_bytes(const QuantizeBlockwiseArgs& a, int64_t first_block, int64_t last_block, const F& f) {
    const T* x = a.x.as<T>();
    uint8_t* q = a.q.as<uint8_t>();
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t begin = block * a.blocksize, end = std::min(begin + a.blocksize, a.x.numel);
        float absmax = 0;  // NaNs do not count
        for (int64_t i = begin; i < end; ++i) {
            const float v = std::fabs(to_float(x[i]));
            absmax = v > absmax ? v : absmax;
        }
        a.absmax.as<float>()[block] = absmax;
        const float factor = 1.0f / absmax;
        if (absmax == 0)
            std::fill(q + begin, q + end, 0);
        else
            for (int64_t i = begin; i < end; ++i) q[i] = f(point(to_float(x[i]) * factor));
    }
}

}  // namespace

void quantize_blockwise(const QuantizeBlockwiseArgs& a, int threads) {
    const Nearest nearest(a.code.as<float>());
    std::vector<uint8_t> table;
    if (a.x.numel > 2048) table = nearest.table();  // from there on cheaper than a search for each element
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(threads, ceil_div(a.x.numel, a.blocksize), ceil_div(1 << 14, a.blocksize),
                     [&](int64_t first, int64_t last) {
                         if (table.empty())
                             quantize_bytes<T>(a, first, last, nearest);
                         else
                             quantize_bytes<T>(a, first, last, [&](int point) { return table[point]; });
                     });
    });
}

void dequantize_blockwise(const DequantizeBlockwiseArgs& a, int threads) {
    dispatch_float<Half, BFloat16>(a.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const uint8_t* q = a.q.as<uint8_t>();
        const float* code = a.code.as<float>();
        parallel_for(threads, ceil_div(a.q.numel, a.blocksize), ceil_div(1 << 16, a.blocksize),
                     [&](int64_t first, int64_t last) {
                         for (int64_t block = first; block < last; ++block) {
                             const float absmax = a.absmax.as<float>()[block];
                             const int64_t end = std::min((block + 1) * a.blocksize, a.q.numel);
                             for (int64_t i = block * a.blocksize; i < end; ++i)
                                 a.out.as<T>()[i] = from_float<T>(code[q[i]] * absmax);
                         }
                     });
    });
}

}  // namespace pyqlora::cpu
