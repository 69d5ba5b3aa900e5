// float16 and bfloat16 as stored bits, with round-to-nearest-even conversions, for the portable CPU kernels.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/tensor.h"

namespace pyqlora {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ffu;
    if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    const auto u = bit_cast<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40)};  // NaN stays NaN
    return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
    const auto u = bit_cast<uint32_t>(x);
    const uint32_t sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (a >> 13 & 0x3ffu))};
    if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from 65520 up: infinity
    if (a < 0x38800000u) {  // subnormal: adding 0.5 shifts the mantissa into place and rounds it
        const float shifted = bit_cast<float>(a) + 0.5f;
        return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    return {static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13))};
}

}  // namespace pyqlora
