// Advice on unified memory and its moves: CUDA 13 names a place by a cudaMemLocation, CUDA 12 by a device index.
#pragma once
#include <cuda_runtime.h>

namespace pyqlora::cuda {

#if CUDART_VERSION >= 13000
inline cudaMemLocation location(int device) {
    return {device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice,
            device == cudaCpuDeviceId ? 0 : device};
}
inline cudaError_t advise(const void* p, size_t bytes, cudaMemoryAdvise advice, int device) {
    return cudaMemAdvise(p, bytes, advice, location(device));
}
inline cudaError_t migrate(const void* p, size_t bytes, int device, cudaStream_t stream) {
    return cudaMemPrefetchAsync(p, bytes, location(device), 0, stream);
}
#else
inline cudaError_t advise(const void* p, size_t bytes, cudaMemoryAdvise advice, int device) {
    return cudaMemAdvise(p, bytes, advice, device);
}
inline cudaError_t migrate(const void* p, size_t bytes, int device, cudaStream_t stream) {
    return cudaMemPrefetchAsync(p, bytes, device, stream);
}
#endif

}  // namespace pyqlora::cuda
