// Arithmetic and memory intrinsics. Everything is compiled with -ffp-contract=off, so that a * b + c rounds twice.
#pragma once

namespace emulation {
template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
template <class T>
void require_aligned(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("%zu-byte access at the misaligned address %p", sizeof(T), p);
}
}  // namespace emulation

template <class T>
T __ldg(const T* p) {
    emulation::require_aligned(p);
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return __ldg(p);
}

template <class T>
void __stwb(T* p, T value) {
    *p = value;
}

inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
inline int __float_as_int(float x) { return emulation::bits<int>(x); }
inline float __int_as_float(int x) { return emulation::bits<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fadd_rd(float a, float b) {  // towards minus infinity; a double holds the sum of neighbouring magnitudes
    const double exact = static_cast<double>(a) + b;
    const auto nearest = static_cast<float>(exact);
    return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
