// What CUDA C++ has no word for: the only file with inline PTX. Its twin under emulation/include/core gives the same
// names a meaning on a CPU, which is also why shared memory is declared through the two macros below.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// __shared__ T name, for array types too: PYQLORA_SHARED(float[16], table);
#define PYQLORA_SHARED(T, name) __shared__ std::enable_if_t<true, T> name
// The launch's dynamic shared memory, 16-byte aligned, as T* name.
#define PYQLORA_DYNAMIC_SHARED(T, name)                                            \
    extern __shared__ __align__(16) unsigned char pyqlora_dynamic_shared_memory[]; \
    T* const name = reinterpret_cast<T*>(pyqlora_dynamic_shared_memory)

namespace pyqlora::cuda {

// A 32-bit load of bytes that are read once: streams through L2 and leaves L1 to the tables.
__device__ __forceinline__ uint32_t load_streaming(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Eight bytes likewise, of rows that a warp walks along: L2 fetches the 128-byte line around them at once.
__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// d = a * b + c on one warp: a 16x16 (row major), b 16x8 (column major), c and d 16x8. Lane l holds, with g = l / 4 and
// t = l % 4: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, +9], a[3] = A[g+8][2t+8, +9],
// b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, +9][g], d[0, 1] = D[g][2t, 2t+1], d[2, 3] = D[g+8][2t, 2t+1].
// bfloat16 needs sm_80; half runs from sm_75 on, there as two m16n8k8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
              "f"(c[3]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
              "f"(c[3]));
    }
#else
    if constexpr (std::is_same_v<T, __half>) {
        float e[4];
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
                     : "=f"(e[0]), "=f"(e[1]), "=f"(e[2]), "=f"(e[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                     : "r"(a[2]), "r"(a[3]), "r"(b[1]), "f"(e[0]), "f"(e[1]), "f"(e[2]), "f"(e[3]));
    } else {
        __trap();  // the host never launches bfloat16 tensor-core kernels below sm_80
    }
#endif
}

}  // namespace pyqlora::cuda
