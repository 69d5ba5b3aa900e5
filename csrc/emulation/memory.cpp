// Device memory and the part of the CUDA runtime that concerns it.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "cuda_runtime.h"
#include "engine.h"

namespace emulation {
namespace {

constexpr size_t kArena = size_t(64) << 30, kPage = 4096, kAlign = 16;
char* arena = nullptr;
size_t arena_top = 0;

struct Allocation {
    size_t bytes;
    char* pages;
    size_t page_bytes;
    int device;
    bool everywhere;
};
std::map<char*, Allocation> allocations;
int device_count = 1, current = 0;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

void* allocate(size_t bytes, int device, bool everywhere) {
    if (!arena) {
        void* p = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return nullptr;
        arena = static_cast<char*>(p);
    }
    const size_t usable = round_up(bytes + kAlign, kPage), page_bytes = usable + kPage;
    if (arena_top + page_bytes > kArena) return nullptr;
    char* pages = arena + arena_top;
    arena_top += page_bytes;
    mprotect(pages, usable, PROT_READ | PROT_WRITE);
    std::memset(pages, 0xff, usable);
    char* p = pages + usable - round_up(bytes, kAlign);
    allocations[p] = {bytes, pages, page_bytes, device, everywhere};
    checks::allocated(p, bytes);
    return p;
}

bool release(void* p) {
    const auto found = allocations.find(static_cast<char*>(p));
    if (found == allocations.end()) return false;
    const Allocation& a = found->second;
    mmap(a.pages, a.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    allocations.erase(found);
    return true;
}

DeviceSpan device_span() { return {arena, arena ? kArena : 0}; }
DeviceSpan allocation_below(const void* p) {
    auto above = allocations.upper_bound(static_cast<char*>(const_cast<void*>(p)));
    if (above == allocations.begin()) return {nullptr, 0};
    --above;
    return {above->first, above->second.bytes};
}
bool is_device(const void* p, size_t bytes) {
    const DeviceSpan a = allocation_below(p);
    return a.begin && static_cast<const char*>(p) + bytes <= a.begin + a.bytes;
}
int device_of(const void* p) { return is_device(p) ? allocations.at(allocation_below(p).begin).device : 0; }
bool reachable(const void* p) {
    return is_device(p) && (device_of(p) == current || allocations.at(allocation_below(p).begin).everywhere);
}
int current_device() { return current; }
void set_device_count(int count) { device_count = count, current = 0; }

}  // namespace emulation

cudaError_t cudaGetLastError() { return emulation::failed() ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorLaunchFailure:
            return "cudaErrorLaunchFailure";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle:
            return "cudaErrorInvalidResourceHandle";
        case cudaErrorStreamCaptureUnsupported:
            return "cudaErrorStreamCaptureUnsupported";
        default:
            return "cudaErrorUnknown";
    }
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulation::report() : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) {
    *device = emulation::current;
    return cudaSuccess;
}
namespace {
int compute_capability_major = 8;
}
void emulation::set_compute_capability(int major) { compute_capability_major = major; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrConcurrentManagedAccess ? emulation::concurrent_managed_access()
                                                             : compute_capability_major;
    return device >= 0 && device < emulation::device_count ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulation::device_count) return cudaErrorInvalidDevice;
    emulation::current = device;
    return cudaSuccess;
}
