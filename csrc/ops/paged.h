// paged: optimizer states that live in host memory and visit the GPU for their step.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace pyqlora {

struct PrefetchArgs {
    TensorRef tensor;  // any dtype, in memory that can be paged
    bool to_cpu;       // towards the processor that uses it next, on the CPU: to the file
    int device;        // index of the GPU
};

inline void check(const PrefetchArgs& a, Device) {
    if (!a.tensor.defined()) bad_argument("prefetch", "tensor", "a tensor", "None");
    if (!a.tensor.contiguous) bad_argument("prefetch", "tensor", "a contiguous tensor", "a strided one");
}

namespace cpu {
// Asks the kernel to read the pages of a file-backed tensor, or to write and drop them.
void prefetch(const PrefetchArgs& a, int threads);
}  // namespace cpu

namespace cuda {

// Moves unified memory on the stream.
void prefetch(const PrefetchArgs& a, void* stream);

// Zeros in unified memory, which migrates; or, where the GPU cannot share it with a running CPU
// (concurrentManagedAccess is 0), in pinned memory, which is copied to a `slot` of as many bytes on the GPU and back.
// Moves run on a stream of the device's own, next to the caller's kernels, in the order of the calls.
class PagedMemory {
  public:
    PagedMemory(int64_t bytes, int device);
    ~PagedMemory();
    PagedMemory(const PagedMemory&) = delete;
    PagedMemory& operator=(const PagedMemory&) = delete;

    // To the GPU, after all that `stream` was given so far.
    void fetch(const TensorRef& slot, void* stream);
    // All that `stream` was given so far is done with it: a slot is copied back, and unified memory stays on the GPU
    // until the driver needs the room there.
    void finish(const TensorRef& slot, void* stream);
    // What `stream` is given from now on comes after the last move.
    void join(void* stream);
    // The host waits for the last move.
    void synchronize();

    void* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    bool managed() const { return managed_; }

  private:
    void check_slot(const TensorRef& slot) const;
    void* begin_move(void* stream);
    void release();

    void* data_ = nullptr;
    int64_t bytes_;
    int device_;
    bool managed_ = false;
    void *given_ = nullptr, *moved_ = nullptr;  // events: what the stream had been given, the last move or finish
};

}  // namespace cuda
}  // namespace pyqlora
