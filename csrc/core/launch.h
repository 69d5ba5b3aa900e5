// How every kernel is started: on the tensor's device and the caller's stream, with any error as a Python exception.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/tensor.h"

namespace pyqlora::cuda {

// Raises RuntimeError as "operation: CUDA error name: text". Reading the error also clears it, so that it does not come
// up again in an unrelated call.
inline void check_cuda(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    std::string text = std::string(op) + ": CUDA error " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice)
        text += " (build with PYQLORA_CUDA_ARCHS set to this GPU's architecture)";
    throw std::runtime_error(text);
}

// Makes a device current for as long as it lives.
class DeviceGuard {
  public:
    DeviceGuard(const char* op, int device) {
        check_cuda(op, cudaGetDevice(&before_));
        if (device == before_) return;
        check_cuda(op, cudaSetDevice(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Tensor cores multiply bfloat16 from compute capability 8.0 on. Raises RuntimeError below it.
inline void require_bf16_tensor_cores(const char* op, const TensorRef& where) {
    int major = 0;
    check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.device_index));
    if (major < 8)
        throw std::runtime_error(std::string(op) +
                                 ": bfloat16 needs a GPU of compute capability 8.0 or later, this one has " +
                                 std::to_string(major) + ".x (use float16)");
}

struct Grid {
    int64_t blocks;  // 0: nothing to do
    int threads;
    size_t shared = 0;  // bytes of dynamic shared memory
};

// kernel<<<grid>>>(args...) on the device of `where` and on `stream`. Neither allocates nor synchronises, so that it
// may be captured into a CUDA graph.
template <class... Parameters, class... Args>
void launch(const char* op, const TensorRef& where, void* stream, Grid grid, void (*kernel)(Parameters...),
            Args&&... args) {
    if (grid.blocks == 0) return;
    const DeviceGuard guard(op, where.device_index);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    constexpr size_t without_asking = 48 << 10;
    if (grid.shared > without_asking)
        check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(grid.shared)));
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
}

}  // namespace pyqlora::cuda
