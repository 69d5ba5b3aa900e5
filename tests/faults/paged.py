"""Faults in the order of paging's moves."""

from faults import Fault

SOURCE = "ops/paged_cuda.cu"
TESTS = "ops/test_paged_cuda.py"

FAULTS = [
    Fault(
        "caller does not wait for the move",
        "cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event(moved_), 0)",
        "cudaSuccess",
    ),
    Fault("move does not wait for the caller", "check_cuda(kOp, cudaStreamWaitEvent(own, event(given_), 0));", ""),
    Fault(
        "caller's event recorded after nothing",
        "cudaEventRecord(event(given_), static_cast<cudaStream_t>(stream))",
        "cudaEventRecord(event(given_), own)",
    ),
    Fault(
        "move's event recorded in the caller's stream",
        "cudaEventRecord(event(moved_), own)",
        "cudaEventRecord(event(moved_), static_cast<cudaStream_t>(stream))",
    ),
    Fault("move's event never recorded", "check_cuda(kOp, cudaEventRecord(event(moved_), own));", ""),
    Fault("unified memory moves in another stream", "bytes_, device_, own)", "bytes_, device_, nullptr)"),
    Fault("unified memory stays on the host", "bytes_, device_, own)", "bytes_, cudaCpuDeviceId, own)"),
    Fault(
        "pinned memory is copied in another stream", "cudaMemcpyHostToDevice, own)", "cudaMemcpyHostToDevice, nullptr)"
    ),
    Fault(
        "pinned memory is copied back in another stream",
        "cudaMemcpyDeviceToHost, last)",
        "cudaMemcpyDeviceToHost, nullptr)",
    ),
    Fault(
        "states are not copied back",
        "cudaMemcpyAsync(data_, slot.data, bytes_, cudaMemcpyDeviceToHost, last)",
        "cudaSuccess",
    ),
    Fault("last use never recorded", "check_cuda(kOp, cudaEventRecord(event(moved_), last));", ""),
    Fault("host does not wait for the move", "check_cuda(kOp, cudaEventSynchronize(event(moved_)));", ""),
    Fault("states do not begin as zeros", "std::memset(data_, 0, bytes);", ""),
    Fault("memory is not freed", "if (data_) managed_ ? cudaFree(data_) : cudaFreeHost(data_);", ""),
    Fault("pinned memory taken for unified", "managed_ = shares_memory(kOp, device);", "managed_ = true;"),
]
