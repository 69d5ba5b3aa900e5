// The CUDA runtime, as far as core/launch.h uses it: devices, and launches in the order of streams.h.
#pragma once
#include <tuple>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrConcurrentManagedAccess = 89 };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
namespace emulation {
void set_compute_capability(int major);
}

#include "emulation/streams.h"

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulation {
bool reachable(const void* p);  // by kernels on the current device
// A pointer handed to a kernel is null or memory of its device.
template <class T>
bool device_argument(const T& argument) {
    if constexpr (std::is_pointer_v<T>) return !argument || reachable(argument);
    return true;
}
inline bool valid(const cudaLaunchConfig_t& c) {
    const dim3 g = c.gridDim, b = c.blockDim;
    const uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
    return g.x && g.y && g.z && g.x < 1u << 31 && g.y < 65536 && g.z < 65536 && threads && threads <= 1024 && b.z <= 64;
}
}  // namespace emulation

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return emulation::set_dynamic_limit(reinterpret_cast<const void*>(kernel), bytes) ? cudaSuccess
                                                                                      : cudaErrorInvalidValue;
}

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
    if (!emulation::valid(*config)) return cudaErrorInvalidConfiguration;
    if (!emulation::dynamic_shared_allowed(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes))
        return cudaErrorInvalidValue;
    if (!(emulation::device_argument<std::decay_t<Args>>(args) && ...))
        return emulation::refuse("a kernel argument points to host memory, or another device's"),
               cudaErrorLaunchFailure;
    if (!emulation::on_current_device(config->stream)) return cudaErrorInvalidResourceHandle;
    const std::tuple<std::decay_t<Parameters>...> arguments(static_cast<Parameters>(args)...);
    auto launch = [kernel, arguments, config = *config] {
        auto call = [&] { std::apply(kernel, arguments); };
        return emulation::run_grid(
            config.gridDim, config.blockDim, config.dynamicSmemBytes,
            [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
    };
    return emulation::enqueue(config->stream, &arguments, sizeof arguments, true, launch);
}
