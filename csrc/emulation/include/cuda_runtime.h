// Stands in for CUDA's header of this name, so that a .cu file compiles with g++ and runs on a CPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "engine.h"

#define CUDART_VERSION 12000  // kernel arguments of up to 4 KB, so that tables of tensors are split early

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict

// ---- built-in types and variables ---------------------------------------------------------------------------------
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {
template <class V>
V& assign(V& to, const V& from) {
    if (reinterpret_cast<uintptr_t>(&to) % sizeof(V))
        fail("%zu-byte access at the misaligned address %p", sizeof(V), static_cast<void*>(&to));
    std::memcpy(&to, &from, sizeof(V));
    return to;
}
}  // namespace emulation

// Vector types are stored as a whole.
#define EMULATION_VECTOR(V, T, bytes, ...)                                     \
    struct alignas(bytes) V {                                                  \
        T __VA_ARGS__;                                                         \
        V& operator=(const V& from) { return emulation::assign(*this, from); } \
    };
EMULATION_VECTOR(int2, int, 8, x, y)
EMULATION_VECTOR(int4, int, 16, x, y, z, w)
EMULATION_VECTOR(uint2, unsigned, 8, x, y)
EMULATION_VECTOR(uint4, unsigned, 16, x, y, z, w)
EMULATION_VECTOR(float2, float, 8, x, y)
EMULATION_VECTOR(float4, float, 16, x, y, z, w)
EMULATION_VECTOR(double2, double, 16, x, y)

inline double2 make_double2(double x, double y) { return {x, y}; }

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

using std::max;
using std::min;

#include "emulation/intrinsics.h"
#include "emulation/runtime.h"
#include "emulation/warp.h"
