// The twin of core/ptx.cuh: the same names on a CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYQLORA_SHARED(T, name)                                               \
    static const char name##_key = 0;                                         \
    auto& name = *static_cast<std::add_pointer_t<std::enable_if_t<true, T>>>( \
        emulation::static_shared(&name##_key, sizeof(T), alignof(T) > 16 ? alignof(T) : 16, #name))
#define PYQLORA_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared())

namespace pyqlora::cuda {

inline uint32_t load_streaming(const uint32_t* p) { return __ldg(p); }
inline uint2 load_streaming(const uint2* p) { return __ldg(p); }

inline void copy_async_16(void* shared, const void* global, bool valid = true, EMULATION_HERE) {
    emulation::copy_async(shared, global, 16, valid ? 16 : 0, file, line);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
    emulation::wait_copies(kPending);
}

struct LoadMatrices {
    uint32_t* r;
    const void* row;
    const char* file;
    int line;
};
template <bool kTransposed>
void load_matrices_lanes(unsigned, void* const* operands) {
    for (int l = 0; l < 32; ++l) {
        for (int j = 0; j < 4; ++j) {
            uint32_t word = 0;
            for (int h = 0; h < 2; ++h) {
                const int along = l % 4 * 2 + h, i = kTransposed ? along : l / 4, k = kTransposed ? l / 4 : along;
                const auto* o = static_cast<LoadMatrices*>(operands[8 * j + i]);
                if (!emulation::inside_shared_object(o->row, 16) || emulation::shared_offset(o->row) % 16)
                    emulation::fail("ldmatrix of no aligned row of shared memory at %s:%d", o->file, o->line);
                const auto* element = static_cast<const uint16_t*>(o->row) + k;
                emulation::checks::access(element, 2, false, l);
                word |= static_cast<uint32_t>(*element) << 16 * h;
            }
            static_cast<LoadMatrices*>(operands[l])->r[j] = word;
        }
    }
}
template <bool kTransposed = false>
void load_matrices(uint32_t (&r)[4], const void* row, EMULATION_HERE) {
    LoadMatrices operands{r, row, file, line};
    emulation::warp_collective(emulation::ldmatrix, 0xffffffffu, &operands, load_matrices_lanes<kTransposed>, file,
                               line);
}

inline void wait_at_barrier(int barrier, int threads, EMULATION_HERE) {
    emulation::warp_barrier(barrier, threads, true, file, line);
}
inline void pass_barrier(int barrier, int threads, EMULATION_HERE) {
    emulation::warp_barrier(barrier, threads, false, file, line);
}

// Lane l's registers, as in the comment of the original. Sums in double and rounds once: hardware is less exact.
struct MmaOperands {
    float* d;
    const uint32_t *a, *b;
    const float* c;
};
template <class T>
void mma_lanes(unsigned, void* const* operands) {
    auto value = [](uint32_t word, int half) {
        const auto bits = static_cast<uint16_t>(word >> 16 * half);
        return static_cast<float>(emulation::bits<T>(bits));
    };
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l) {
        const auto* o = static_cast<MmaOperands*>(operands[l]);
        const int g = l / 4, t = l % 4;
        for (int h = 0; h < 2; ++h) {
            for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][2 * t + h + r / 2 * 8] = value(o->a[r], h);
            for (int r = 0; r < 2; ++r) B[2 * t + h + r * 8][g] = value(o->b[r], h);
        }
    }
    for (int l = 0; l < 32; ++l) {
        const auto* o = static_cast<MmaOperands*>(operands[l]);
        const int g = l / 4, t = l % 4;
        float d[4];
        for (int r = 0; r < 4; ++r) {
            double sum = o->c[r];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[g + r / 2 * 8][k]) * B[k][2 * t + r % 2];
            d[r] = static_cast<float>(sum);
        }
        for (int r = 0; r < 4; ++r) o->d[r] = d[r];
    }
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], EMULATION_HERE) {
    MmaOperands operands{d, a, b, c};
    emulation::warp_collective(emulation::mma, 0xffffffffu, &operands, mma_lanes<T>, file, line);
}

}  // namespace pyqlora::cuda
