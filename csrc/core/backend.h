// The two backends as types, so that one template binds an operation for both: which device its tensors are on, and
// what the last argument of every native call, `context`, means: the number of threads, or a cudaStream_t.
#pragma once
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace pyqlora {

struct CpuBackend {
    static constexpr Device device = Device::cpu;
    using Context = int;
    static Context context(int64_t value) { return static_cast<int>(value); }
};

struct CudaBackend {
#if defined(PYQLORA_EMULATION)
    static constexpr Device device = Device::cpu;  // emulated device memory is host memory
#else
    static constexpr Device device = Device::cuda;
#endif
    using Context = void*;
    static Context context(int64_t value) { return reinterpret_cast<void*>(value); }
};

#if defined(PYQLORA_WITH_CUDA) || defined(PYQLORA_EMULATION)
#define PYQLORA_BIND_CUDA 1
#else
#define PYQLORA_BIND_CUDA 0
#endif
#if defined(PYQLORA_EMULATION)
#define PYQLORA_BIND_CPU 0
#else
#define PYQLORA_BIND_CPU 1
#endif

// check() then launch, without the GIL.
template <class Backend, class Args, class Launch>
void run(const Args& args, int64_t context, Launch launch) {
    check(args, Backend::device);
    pybind11::gil_scoped_release release;
    launch(args, Backend::context(context));
}

}  // namespace pyqlora
