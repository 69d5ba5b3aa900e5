// What the two linear_4bit kernels share.
#pragma once
#include "core/vector.cuh"
#include "ops/linear_4bit.h"
#include "ops/quantize_cuda.cuh"

namespace pyqlora::cuda {

// A bias in any dtype, or none: zeros.
struct DeviceBias {
    const void* data;
    DType dtype;

    explicit DeviceBias(const TensorRef& t) : data(t.data), dtype(t.dtype) {}

    __device__ __forceinline__ float operator[](int64_t i) const {
        if (!data) return 0.0f;
        if (dtype == DType::f32) return __ldg(static_cast<const float*>(data) + i);
        if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[i]);
        return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    }
};

}  // namespace pyqlora::cuda
