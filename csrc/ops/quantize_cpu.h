// What the CPU kernels of other operations use of quantize: a block's scale, and decoding a run of elements.
#pragma once
#include <algorithm>
#include <cstdint>

#include "ops/quantize.h"

namespace pyqlora::cpu {

// absmax of a block, decoded from 8 bits under double quantization.
class BlockScale {
  public:
    explicit BlockScale(const Scales& s)
        : absmax_(s.absmax.as<float>()),
          codes_(s.absmax.as<uint8_t>()),
          nested_absmax_(s.nested_absmax.as<float>()),
          nested_code_(s.nested_code.as<float>()),
          offset_(s.nested() ? *s.offset.as<float>() : 0),
          nested_shift_(__builtin_ctzll(static_cast<uint64_t>(s.nested_blocksize))),
          nested_(s.nested()) {}

    float operator()(int64_t block) const {
        if (!nested_) return absmax_[block];
        return nested_code_[codes_[block]] * nested_absmax_[block >> nested_shift_] + offset_;
    }

    // The scales of blocks [first, last).
    void range(int64_t first, int64_t last, float* out) const {
        if (!nested_) std::copy(absmax_ + first, absmax_ + last, out);
        while (nested_ && first < last) {
            const int64_t group = first >> nested_shift_, stop = std::min((group + 1) << nested_shift_, last);
            const float nested_absmax = nested_absmax_[group];
            for (; first < stop; ++first) *out++ = nested_code_[codes_[first]] * nested_absmax + offset_;
        }
    }

  private:
    const float* absmax_;
    const uint8_t* codes_;
    const float *nested_absmax_, *nested_code_;
    float offset_;
    int nested_shift_;
    bool nested_;
};

// Elements [begin, end) of a packed weight into `out`, on this thread.
void decode_4bit(const uint8_t* packed, const BlockScale& scale, QuantType type, int64_t blocksize, int64_t begin,
                 int64_t end, float* out);

}  // namespace pyqlora::cpu
