#include <cstring>
#include <map>
#include <mutex>

#include "core/launch.h"
#include "ops/paged.h"
#include "ops/paged_cuda.h"

namespace pyqlora::cuda {
namespace {

constexpr const char* kOp = "paged";

cudaEvent_t event(void* e) { return static_cast<cudaEvent_t>(e); }

// The streams of each device's moves, for the life of the process.
std::mutex mutex;
std::map<int, cudaStream_t> streams;

cudaStream_t moves(int device) {
    const std::lock_guard lock(mutex);
    cudaStream_t& stream = streams[device];
    if (!stream) check_cuda(kOp, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

bool shares_memory(const char* op, int device) {
    int concurrent = 0;
    check_cuda(op, cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device));
    return concurrent != 0;
}

}  // namespace

void prefetch(const PrefetchArgs& a, void* stream) {
    const DeviceGuard guard("prefetch", a.device);
    if (!shares_memory("prefetch", a.device)) return;  // pinned memory stays where it is
    check_cuda("prefetch", migrate(a.tensor.data, a.tensor.bytes(), a.to_cpu ? cudaCpuDeviceId : a.device,
                                   static_cast<cudaStream_t>(stream)));
}

PagedMemory::PagedMemory(int64_t bytes, int device) : bytes_(bytes), device_(device) {
    const DeviceGuard guard(kOp, device);
    managed_ = shares_memory(kOp, device);
    try {
        if (managed_) {
            check_cuda(kOp, cudaMallocManaged(&data_, bytes, cudaMemAttachGlobal));
            // Pages for which the GPU has no room are read over the bus instead of faulting.
            check_cuda(kOp, advise(data_, bytes, cudaMemAdviseSetPreferredLocation, cudaCpuDeviceId));
            check_cuda(kOp, advise(data_, bytes, cudaMemAdviseSetAccessedBy, device));
        } else {
            check_cuda(kOp, cudaHostAlloc(&data_, bytes, cudaHostAllocDefault));
        }
        for (void** e : {&given_, &moved_}) {
            cudaEvent_t created = nullptr;
            check_cuda(kOp, cudaEventCreateWithFlags(&created, cudaEventDisableTiming));
            *e = created;
        }
        moves(device);
    } catch (...) {
        release();
        throw;
    }
    std::memset(data_, 0, bytes);
}

PagedMemory::~PagedMemory() { release(); }

// Errors are the next call's.
void PagedMemory::release() {
    for (void* e : {given_, moved_}) {
        if (!e) continue;
        cudaEventSynchronize(event(e));
        cudaEventDestroy(event(e));
    }
    if (data_) managed_ ? cudaFree(data_) : cudaFreeHost(data_);
}

void PagedMemory::check_slot(const TensorRef& slot) const {
    if (!managed_ && (!slot.defined() || slot.bytes() < bytes_))
        bad_argument(kOp, "slot", "a tensor of " + std::to_string(bytes_) + " bytes",
                     slot.defined() ? std::to_string(slot.bytes()) : "None");
}

// The stream of moves, which waits for what the caller's was given so far.
void* PagedMemory::begin_move(void* stream) {
    const cudaStream_t own = moves(device_);
    check_cuda(kOp, cudaEventRecord(event(given_), static_cast<cudaStream_t>(stream)));
    check_cuda(kOp, cudaStreamWaitEvent(own, event(given_), 0));
    return own;
}

void PagedMemory::fetch(const TensorRef& slot, void* stream) {
    check_slot(slot);
    const DeviceGuard guard(kOp, device_);
    const auto own = static_cast<cudaStream_t>(begin_move(stream));
    if (managed_)
        check_cuda(kOp, migrate(data_, bytes_, device_, own));
    else
        check_cuda(kOp, cudaMemcpyAsync(slot.data, data_, bytes_, cudaMemcpyHostToDevice, own));
    check_cuda(kOp, cudaEventRecord(event(moved_), own));
}

void PagedMemory::finish(const TensorRef& slot, void* stream) {
    check_slot(slot);
    const DeviceGuard guard(kOp, device_);
    auto last = static_cast<cudaStream_t>(stream);
    if (!managed_) {
        last = static_cast<cudaStream_t>(begin_move(stream));
        check_cuda(kOp, cudaMemcpyAsync(data_, slot.data, bytes_, cudaMemcpyDeviceToHost, last));
    }
    check_cuda(kOp, cudaEventRecord(event(moved_), last));
}

void PagedMemory::join(void* stream) {
    check_cuda(kOp, cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event(moved_), 0));
}

void PagedMemory::synchronize() { check_cuda(kOp, cudaEventSynchronize(event(moved_))); }

}  // namespace pyqlora::cuda
