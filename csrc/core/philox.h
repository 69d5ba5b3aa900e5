// Random bits by counting: the same on every device, for any element, in any order. Philox4x32 with 10 rounds (Salmon
// et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once
#include <cstdint>

#include "core/quant_types.h"

namespace pyqlora {

struct Bits128 {
    uint32_t word[4];
};

PYQLORA_HD Bits128 philox(uint64_t seed, uint64_t high, uint64_t low) {
    uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
    uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Dropout of a matrix: eight neighbouring columns of a row share one draw, 16 bits each. An element is kept if its
// bits are at least `threshold`, of 65536.
constexpr int kDropoutLevels = 1 << 16;

// Bit i: whether element 8 * group + i of the row is kept.
PYQLORA_HD uint32_t kept(uint64_t seed, uint64_t row, uint64_t group, uint32_t threshold) {
    const Bits128 bits = philox(seed, row, group);
    uint32_t result = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < 8; ++i)
        result |= static_cast<uint32_t>((bits.word[i / 2] >> 16 * (i % 2) & 0xffff) >= threshold) << i;
    return result;
}

}  // namespace pyqlora
