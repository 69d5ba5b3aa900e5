// f32, f16 and bf16 tensors as one line of floats, for loops over elements: float32 ones are read and written where
// they are, others pass through a buffer.
#pragma once
#include "core/gemm.h"

namespace pyqlora::cpu {

class Reader {
  public:
    explicit Reader(const TensorRef& tensor) : lines_(rows_of(tensor, tensor.numel)) {}

    // Elements [first, first + count).
    const float* at(int64_t first, int64_t count, float* buffer) const {
        if (lines_.plain) return lines_.plain + first;
        lines_.read(0, first, count, buffer);
        return buffer;
    }

  private:
    Lines lines_;
};

class Writer {
  public:
    explicit Writer(const TensorRef& tensor) : store_(store_to(tensor, tensor.numel)) {}

    // Where to put elements from `first` on; done() ends it.
    float* at(int64_t first, float* buffer) const { return store_.plain ? store_.plain + first : buffer; }
    void done(int64_t first, int64_t count, float* buffer) const {
        if (!store_.plain) store_.row(0, first, count, buffer);
    }

  private:
    Then store_;
};

}  // namespace pyqlora::cpu
