// What the engine must compute and notice, as kernels; tests/test_emulation.py says what each misuse is. They compile
// with nvcc like all others.
#include "probes.h"

#include "core/launch.h"
#include "core/ptx.cuh"

namespace pyqlora::cuda {
namespace {

constexpr int kBig = 100 << 10;  // bytes of dynamic shared memory

// Reversed within the block, by way of shared memory.
__global__ void barrier_kernel(const int* in, int* out, int misuse) {
    PYQLORA_SHARED(int[kProbeThreads], shared);
    const int i = threadIdx.x, last = kProbeThreads - 1;
    if (misuse != 5) shared[i] = in[misuse == 6 ? 4 * i + 3 : i];
    if (misuse == 1) {
    } else if (misuse == 2 && i < 64) {
        __syncthreads();
    } else if (misuse == 3 && i < 64) {
        __syncwarp();
    } else {
        __syncthreads();
    }
    if (misuse == 4) reinterpret_cast<char*>(shared)[sizeof(shared) - 3 + i / 2] = 0;
    out[misuse == 7 ? i % 64 : i] = shared[last - i];
    if (misuse == 8) out[kProbeInts - 1 + i] = 0;
}

// Two groups under way at a time; thread i passes on what thread i ^ 1 has fetched.
__global__ void copies_kernel(const int* in, int* out, int misuse) {
    PYQLORA_SHARED(int4[2][kProbeThreads + 1], stages);
    const int i = threadIdx.x;
    for (int stage = 0; stage < 2; ++stage) {
        const int half = kProbeThreads / 2, from = stage * half + i % half;
        void* to = reinterpret_cast<char*>(&stages[stage][i]) + (misuse == 4 ? 8 : 0);
        copy_async_16(to, in + 4 * (misuse == 5 ? from + half + 1 : from), i < half || stage == 1);
        commit_copies();
    }
    if (misuse == 3) stages[0][i] = int4{};
    if (misuse != 1) wait_copies<1>();
    if (misuse != 2) __syncthreads();
    const int first = stages[0][i ^ 1].x;
    if (misuse != 6) wait_copies<0>();
    __syncthreads();
    out[i] = first, out[i + kProbeThreads] = stages[1][i ^ 1].y;
}

__global__ void matrices_kernel(const int* in, int* out, int misuse) {
    PYQLORA_SHARED(int4[33], rows);
    const int i = threadIdx.x;
    if (i >= 32 || (misuse == 3 && i == 31)) return;
    rows[i] = reinterpret_cast<const int4*>(in)[i];
    if (misuse != 1) __syncwarp();
    uint32_t r[4], c[4];
    load_matrices(r, reinterpret_cast<const char*>(rows + i) + (misuse == 2 ? 4 : 0));
    load_matrices<true>(c, rows + i);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = r[j], out[kProbeThreads + 4 * i + j] = c[j];
}

// Warps 0 and 1 make what warps 2 and 3 take, twice, in one buffer.
__global__ void named_barriers_kernel(const int* in, int* out, int misuse) {
    PYQLORA_SHARED(int[64], buffer);
    constexpr int full = 1, empty = 2;
    const int i = threadIdx.x % 64, all = kProbeThreads;
    for (int turn = 0; turn < 2; ++turn) {
        if (threadIdx.x < 64) {
            if (turn && misuse != 3) wait_at_barrier(empty, all);
            if (misuse == 2) pass_barrier(full, all);
            buffer[i] = in[64 * turn + i];
            if (misuse != 2) pass_barrier(misuse == 5 ? 3 : full, misuse == 4 ? all - 32 : all);
        } else {
            if (misuse != 1) wait_at_barrier(full, all);
            out[64 * turn + i] = buffer[63 - i];
            if (!turn) pass_barrier(empty, all);
        }
    }
}

__global__ void votes_kernel(const int* in, int* out, int misuse) {
    const int i = threadIdx.x, odd = in[i] % 2;
    const unsigned mask = misuse == 1 ? 0xfffffffeu : misuse == 2 && i % 32 == 5 ? 0x0000ffffu : 0xffffffffu;
    const unsigned votes = __ballot_sync(mask, odd);
    const int some = __any_sync(0xffffffffu, odd && i % 32 == 3), every = __all_sync(0xffffffffu, odd || i % 32 < 16);
    const int total = __syncthreads_count(odd), any = __syncthreads_or(in[i] == 77),
              all = __syncthreads_and(in[i] >= 0);
    out[i] = static_cast<int>(votes), out[i + kProbeThreads] = some + 2 * every + 4 * any + 8 * all + 16 * total;
}

__global__ void vectors_kernel(const int* in, int* out, int misuse) {
    const int i = threadIdx.x;
    const int4 v = *reinterpret_cast<const int4*>(in + 4 * i + (misuse == 1 && i == 0));
    *reinterpret_cast<int4*>(out + 4 * i + (misuse == 2 && i == 0)) = {v.w, v.z, v.y, v.x};
    if (misuse == 3) out[0] = __ldg(reinterpret_cast<const int2*>(in + 1)).x;
}

__global__ void dynamic_shared_kernel(const int* in, int* out, int misuse) {
    PYQLORA_DYNAMIC_SHARED(int, shared);
    const int i = threadIdx.x, last = kBig / 4 - kProbeThreads + i;
    shared[last + (misuse == 2)] = in[i];
    out[i] = shared[last + (misuse == 2)];
}

using Kernel = void (*)(const int*, int*, int);

}  // namespace

void probe(const std::string& name, int misuse, const int* in, int* out, void* stream) {
    const TensorRef where{out, kProbeInts, DType::i32, Device::cuda};
    auto run = [&](Kernel kernel, int blocks = 1, size_t shared = 0) {
        launch("probe", where, stream, {blocks, kProbeThreads, shared}, kernel, in, out, misuse);
    };
    if (name == "barrier") return run(barrier_kernel, misuse == 9 ? 2 : 1);
    if (name == "copies") return run(copies_kernel);
    if (name == "matrices") return run(matrices_kernel);
    if (name == "named_barriers") return run(named_barriers_kernel);
    if (name == "votes") return run(votes_kernel);
    if (name == "vectors") return run(vectors_kernel);
    if (name != "dynamic_shared") throw std::invalid_argument("probe: unknown: " + name);
    if (misuse != 1) return run(dynamic_shared_kernel, 1, misuse == 3 ? 228 << 10 : kBig);
    cudaFuncSetAttribute(dynamic_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kProbeThreads), config.gridDim = dim3(1), config.dynamicSmemBytes = kBig;
    check_cuda("probe", cudaLaunchKernelEx(&config, static_cast<Kernel>(dynamic_shared_kernel), in, out, misuse));
}

}  // namespace pyqlora::cuda
