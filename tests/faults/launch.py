"""Faults in how every kernel is launched, seen through those of quantize."""

from faults import Fault

SOURCE = "ops/quantize_cuda.cu"
TESTS = "test_launches.py"
LAUNCH = "core/launch.h"

FAULTS = [
    Fault("on the current device", "    const DeviceGuard guard(op, where.device_index);\n", "", LAUNCH),
    Fault("the caller's device not made current again", "if (changed_) cudaSetDevice(before_);", "", LAUNCH),
    Fault("on the default stream", "config.stream = static_cast<cudaStream_t>(stream);", "", LAUNCH),
    Fault(
        "waits for the kernel",
        "check_cuda(op, cudaLaunchKernelEx(",
        "check_cuda(op, cudaStreamSynchronize(config.stream));\n    check_cuda(op, cudaLaunchKernelEx(",
        LAUNCH,
    ),
]
