// linear_4bit for many rows on the CPU: W goes from 4 bits straight into the packed operand of a matrix product.
#pragma once
#include "core/gemm.h"
#include "ops/linear_4bit.h"
#include "ops/quantize_cpu.h"

namespace pyqlora::cpu {

struct Weight {
    const uint8_t* packed;
    BlockScale scale;
    int64_t k, blocksize;
    QuantType type;
    int log2_blocksize;

    Weight(const TensorRef& packed, const Scales& scales, int64_t k, int64_t blocksize, QuantType type)
        : packed(packed.as<uint8_t>()),
          scale(scales),
          k(k),
          blocksize(blocksize),
          type(type),
          log2_blocksize(__builtin_ctzll(static_cast<uint64_t>(blocksize))) {}
};

Pack columns_of_transposed(const Weight& w);  // B = Wᵀ [k, n]
Pack columns_of(const Weight& w);             // B = W [n, k]

}  // namespace pyqlora::cpu
