// Streams, events and the memory that moves between host and device. Work runs when it is given, or lazily: see
// emulation::set_lazy.
#pragma once
#include <functional>

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaMemAttachGlobal = 1, cudaHostAllocDefault = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaMemoryAdvise { cudaMemAdviseSetPreferredLocation = 3, cudaMemAdviseSetAccessedBy = 5 };
constexpr int cudaCpuDeviceId = -1;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);

cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned flags);
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags);
cudaError_t cudaFree(void* p);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise advice, int device);
cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, int device, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

namespace emulation {

using Operation = std::function<bool()>;  // false: it failed, and report() says why

// Runs at once, or lazily after what the stream was given before. `arguments`: bytes that may hold pointers to managed
// or pinned memory, which then belongs to the device until the operation is done. kernel: it finds managed memory where
// the last prefetch left it.
cudaError_t enqueue(cudaStream_t stream, const void* arguments, size_t bytes, bool kernel, Operation operation);

// Of the device that was current when it was made; the default stream is everyone's.
bool on_current_device(cudaStream_t stream);

// A graph: what `stream` is given from here to end_capture is kept instead of run, and each replay runs it. Meanwhile
// other streams get nothing, nobody allocates, frees or waits: cudaErrorStreamCaptureUnsupported.
void begin_capture(cudaStream_t stream);
void end_capture();
bool replay();

// Lazily, work is queued and runs in a random order that the streams and events allow: some of it early, the rest when
// the host waits. Where it touches managed or pinned memory in the meantime, host_accesses() counts it.
void set_lazy(uint64_t seed);  // 0: eagerly, after all that is queued
void set_concurrent_managed_access(bool supported);
bool concurrent_managed_access();

struct StreamCounts {
    int host_accesses;  // of the host to memory that queued work uses
    int page_faults;    // kernels that found managed memory on the host
    int prefetches, page_outs, copies;
    int allocations;  // managed or pinned, not freed
};
StreamCounts stream_counts();  // since the last set_lazy

}  // namespace emulation
