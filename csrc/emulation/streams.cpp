#include <signal.h>
#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace {

using Flag = std::shared_ptr<bool>;
struct Work {
    emulation::Operation run;
    std::vector<char*> uses;  // managed and pinned allocations
    bool kernel;
    Flag wait;  // run only once it is set
};

}  // namespace

struct CUstream_st {
    std::deque<Work> queue;
    int device;
};
struct CUevent_st {
    int device;
    Flag recorded = std::make_shared<bool>(true);  // by the latest record
};

namespace emulation {
namespace {

// Memory that host and device both reach.
struct Shared {
    size_t bytes;
    bool managed, on_device;
    int users;  // queued operations; the host's accesses are errors meanwhile
};
std::map<char*, Shared> shared;
std::vector<CUstream_st*> streams{new CUstream_st};  // first the default stream
CUstream_st* capturing = nullptr;
std::vector<Work> graph;
uint64_t seed = 0;
bool concurrent = true;
StreamCounts counts{};
struct sigaction previous_handler;

CUstream_st* queue_of(cudaStream_t stream) { return stream ? stream : streams[0]; }

uint64_t random_number() { return seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17; }

void protect(char* p, const Shared& s) {
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + s.bytes + page - 1) & ~(page - 1);
    mprotect(reinterpret_cast<void*>(begin), end - begin, s.users ? PROT_NONE : PROT_READ | PROT_WRITE);
}

std::map<char*, Shared>::iterator find(const void* p) {
    auto above = shared.upper_bound(static_cast<char*>(const_cast<void*>(p)));
    if (above == shared.begin()) return shared.end();
    --above;
    return static_cast<const char*>(p) < above->first + above->second.bytes ? above : shared.end();
}

// The host touched what belongs to queued work: count it, and let it go on.
void on_fault(int signal, siginfo_t* info, void* context) {
    const auto page = reinterpret_cast<uintptr_t>(info->si_addr) & ~uintptr_t(4095);
    for (auto& [p, s] : shared) {
        const auto begin = reinterpret_cast<uintptr_t>(p) & ~uintptr_t(4095);
        if (!s.users || page < begin || page >= reinterpret_cast<uintptr_t>(p) + s.bytes) continue;
        ++counts.host_accesses;
        s.users = 0;
        return protect(p, s);
    }
    if (previous_handler.sa_flags & SA_SIGINFO) return previous_handler.sa_sigaction(signal, info, context);
    sigaction(SIGSEGV, &previous_handler, nullptr);  // and fault again
}

void catch_faults() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    struct sigaction now;
    sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_sigaction != on_fault) sigaction(SIGSEGV, &action, &previous_handler);
}

bool run(Work& work) {
    for (char* p : work.uses) {
        Shared& s = shared.at(p);
        const int users = s.users;
        s.users = 0;
        protect(p, s);
        s.users = users;
        if (work.kernel && s.managed && !s.on_device) ++counts.page_faults;
    }
    const bool ok = work.run();
    for (char* p : work.uses) {
        Shared& s = shared.at(p);
        if (s.users) --s.users;
        protect(p, s);
    }
    return ok;
}

// One operation of a random stream that may go on; false if there is none.
bool progress() {
    std::vector<CUstream_st*> ready;
    for (CUstream_st* s : streams) {
        if (!s->queue.empty() && (!s->queue.front().wait || *s->queue.front().wait)) ready.push_back(s);
    }
    if (ready.empty()) return false;
    CUstream_st* s = ready[random_number() % ready.size()];
    Work work = std::move(s->queue.front());
    s->queue.pop_front();
    run(work);
    return true;
}

template <class Done>
cudaError_t run_until(Done done) {
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    while (!done() && progress()) {
    }
    return failed() ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t run_all() {
    return run_until([] { return false; });
}

cudaError_t enqueue(cudaStream_t stream, Work work) {
    if (capturing) {
        if (queue_of(stream) != capturing) return cudaErrorStreamCaptureUnsupported;
        graph.push_back(std::move(work));
        return cudaSuccess;
    }
    if (!seed) return run(work) ? cudaSuccess : cudaErrorLaunchFailure;
    for (char* p : work.uses) {
        ++shared.at(p).users;
        protect(p, shared.at(p));
    }
    queue_of(stream)->queue.push_back(std::move(work));
    while (random_number() % 2 && progress()) {
    }
    return cudaSuccess;
}

cudaError_t allocate_shared(void** p, size_t bytes, bool managed) {
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    *p = allocate(bytes, current_device(), true);
    if (!*p) return cudaErrorInvalidValue;
    checks::written_by_host(*p, bytes);
    shared[static_cast<char*>(*p)] = {bytes, managed, false, 0};
    return cudaSuccess;
}

cudaError_t free_shared(void* p) {
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    run_all();
    if (!shared.erase(static_cast<char*>(p))) return cudaErrorInvalidValue;
    release(p);
    return cudaSuccess;
}

}  // namespace

cudaError_t enqueue(cudaStream_t stream, const void* arguments, size_t bytes, bool kernel, Operation operation) {
    Work work{std::move(operation), {}, kernel, nullptr};
    for (size_t at = 0; at + sizeof(void*) <= bytes; at += sizeof(void*)) {
        void* p;
        std::memcpy(&p, static_cast<const char*>(arguments) + at, sizeof p);
        const auto found = find(p);
        if (found == shared.end()) continue;
        bool known = false;
        for (char* other : work.uses) known = known || other == found->first;
        if (!known) work.uses.push_back(found->first);
    }
    return enqueue(stream, std::move(work));
}

bool on_current_device(cudaStream_t stream) { return !stream || stream->device == current_device(); }

void begin_capture(cudaStream_t stream) {
    graph.clear();
    capturing = queue_of(stream);
}
void end_capture() { capturing = nullptr; }
bool replay() {
    for (Work& work : graph) {
        if (!run(work)) return false;
    }
    return true;
}

void set_lazy(uint64_t new_seed) {
    run_all();
    catch_faults();
    seed = new_seed ? new_seed * 0x9E3779B97F4A7C15u | 1 : 0;
    counts = {};
}
void set_concurrent_managed_access(bool supported) { concurrent = supported; }
bool concurrent_managed_access() { return concurrent; }
StreamCounts stream_counts() {
    counts.allocations = static_cast<int>(shared.size());
    return counts;
}

}  // namespace emulation

using namespace emulation;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    streams.push_back(*stream = new CUstream_st{{}, current_device()});
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return run_until([=] { return queue_of(stream)->queue.empty(); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return enqueue(stream, {[] { return true; }, {}, false, event->recorded});
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st{current_device()};
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (event->device != (stream ? stream->device : current_device())) return cudaErrorInvalidResourceHandle;
    const Flag flag = event->recorded = std::make_shared<bool>(false);
    return enqueue(stream, {[flag] { return *flag = true; }, {}, false, nullptr});
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return run_until([flag = event->recorded] { return *flag; });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate_shared(p, bytes, true); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate_shared(p, bytes, false); }
cudaError_t cudaFree(void* p) { return free_shared(p); }
cudaError_t cudaFreeHost(void* p) { return free_shared(p); }
cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise, int) {
    const auto found = find(p);
    const bool managed = found != shared.end() && found->second.managed && bytes <= found->second.bytes;
    return managed && concurrent ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, int device, cudaStream_t stream) {
    const auto found = find(p);
    if (found == shared.end() || !found->second.managed || bytes > found->second.bytes || !concurrent)
        return cudaErrorInvalidValue;
    ++(device == cudaCpuDeviceId ? counts.page_outs : counts.prefetches);
    return emulation::enqueue(stream, &p, sizeof p, false, [begin = found->first, device] {
        shared.at(begin).on_device = device != cudaCpuDeviceId;
        return true;
    });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    ++counts.copies;
    const void* both[] = {to, from};
    return emulation::enqueue(stream, both, sizeof both, false, [=] {
        if (bytes) std::memcpy(to, from, bytes);
        if (is_device(to, bytes)) checks::written_by_host(to, bytes);
        return true;
    });
}
