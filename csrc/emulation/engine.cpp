#include "engine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace emulation {
namespace {

enum class State : uint8_t { ready, at_barrier, in_collective, finished };

struct Thread {
    Fiber fiber;
    uint3 index{};
    int linear = 0;
    State state = State::ready;
    const char* file = "";
    int line = 0;
    int vote = 0;
};

struct Arrival {
    Collective kind;
    unsigned mask;
    void* operand;
    Combine combine;
    bool here;
};
struct Warp {
    unsigned alive = 0;
    uint16_t epoch = 0;
    Arrival lanes[32] = {};
};

struct Engine {
    std::mutex mutex;  // one grid at a time
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::vector<int> ready;
    Thread* self = nullptr;
    int count = 0, alive = 0;
    uint32_t launch = 0, block = 0;
    // __syncthreads
    int waiting = 0, votes = 0;
    Vote vote = none;
    uint16_t epoch = 0;
    const char* barrier_file = "";
    int barrier_line = 0;
    // shared memory
    char* shared = nullptr;
    size_t dynamic_bytes = 0, shared_top = 0, static_bytes = 0;
    std::map<const void*, std::pair<size_t, size_t>> statics;  // key: offset, bytes

    Body body = nullptr;
    void* closure = nullptr;
    bool failed = false;
    std::string report;
    Order order = Order::forward;
    uint64_t seed = 1;
};
Engine engine;

uint64_t random_number() {
    engine.seed ^= engine.seed << 13, engine.seed ^= engine.seed >> 7, engine.seed ^= engine.seed << 17;
    return engine.seed;
}

void make_ready(int thread) {
    engine.threads[thread]->state = State::ready;
    engine.ready.push_back(thread);
}

void wait(State state, const char* file, int line) {
    Thread& me = *engine.self;
    me.state = state, me.file = file, me.line = line;
    me.fiber.leave();
}

void release_barrier() {
    for (int i = 0; i < engine.count; ++i) {
        Thread& t = *engine.threads[i];
        if (t.state != State::at_barrier) continue;
        t.vote = engine.votes;
        make_ready(i);
    }
    engine.waiting = 0;
    ++engine.epoch;
}

// Computes a warp's collective once every live lane of its mask has arrived. `me`: the lane that is running, or -1.
bool try_collective(Warp& warp, int first_thread, unsigned mask, Collective kind, int me) {
    const unsigned needed = mask & warp.alive;
    void* operands[32] = {};
    for (int l = 0; l < 32; ++l) {
        if (!(needed >> l & 1)) continue;
        const Arrival& a = warp.lanes[l];
        if (!a.here) return false;
        if (a.kind != kind || a.mask != mask) {
            if (me < 0 || !(a.mask >> me & 1)) return false;
            const Thread &there = *engine.threads[first_thread + l], &here = *engine.threads[first_thread + me];
            fail("warp collective mismatch: lane %d waits at %s:%d with mask %08x, lane %d arrives at %s:%d with %08x",
                 l, there.file, there.line, a.mask, me, here.file, here.line, mask);
        }
        operands[l] = a.operand;
    }
    if (!needed) return false;
    warp.lanes[__builtin_ctz(needed)].combine(needed, operands);
    if (kind == sync_warp && needed == warp.alive) ++warp.epoch;
    for (int l = 0; l < 32; ++l) {
        if (!(needed >> l & 1)) continue;
        warp.lanes[l].here = false;
        if (l != me) make_ready(first_thread + l);
    }
    return true;
}

// A thread that returns leaves its block's barrier and its warp's masks; others may have waited only for it.
void finish(Thread& me) {
    me.state = State::finished;
    --engine.alive;
    Warp& warp = engine.warps[me.linear / 32];
    warp.alive &= ~(1u << me.linear % 32);
    if (engine.alive && engine.waiting == engine.alive) release_barrier();
    for (const Arrival& a : warp.lanes) {
        if (a.here && try_collective(warp, me.linear / 32 * 32, a.mask, a.kind, -1)) break;
    }
}

void thread_main() {
    engine.body(engine.closure);
    finish(*engine.self);
    engine.self->fiber.leave_for_good();
}

std::string where(const Thread& t) {
    const char* what = t.state == State::at_barrier ? "at __syncthreads" : "in a warp collective";
    char text[256];
    std::snprintf(text, sizeof text, "\n  thread (%u,%u,%u) %s %s:%d", t.index.x, t.index.y, t.index.z, what, t.file,
                  t.line);
    return text;
}

void begin_block(uint3 index, size_t dynamic_bytes) {
    blockIdx = index;
    ++engine.block;
    engine.statics.clear();
    engine.static_bytes = 0;
    engine.shared_top = engine.dynamic_bytes = dynamic_bytes;
    std::memset(engine.shared, 0xff, kSharedBytes);  // NaN for whoever reads before writing
    checks::begin_block();
    engine.warps.assign((engine.count + 31) / 32, Warp{});
    engine.ready.clear();
    engine.alive = engine.count;
    engine.waiting = 0;
    engine.epoch = 1;
    for (int i = 0; i < engine.count; ++i) {
        Thread& t = *engine.threads[i];
        t.linear = i;
        t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        engine.warps[i / 32].alive |= 1u << i % 32;
        t.fiber.start(thread_main);
        make_ready(i);
    }
}

void run_block() {
    size_t head = 0;  // forward order takes from the front, the others swap-remove
    while (engine.alive && !engine.failed) {
        const size_t runnable = engine.ready.size() - head;
        if (!runnable) {
            engine.report = "deadlock: no thread can run";
            int shown = 0;
            for (int i = 0; i < engine.count && shown < 6; ++i) {
                if (engine.threads[i]->state == State::finished) continue;
                engine.report += where(*engine.threads[i]);
                ++shown;
            }
            engine.failed = true;
            break;
        }
        int next;
        if (engine.order == Order::forward) {
            next = engine.ready[head++];
            if (head == engine.ready.size()) engine.ready.clear(), head = 0;
        } else {
            const size_t k = engine.order == Order::reverse ? runnable - 1 : random_number() % runnable;
            next = engine.ready[k];
            engine.ready[k] = engine.ready.back();
            engine.ready.pop_back();
        }
        engine.self = engine.threads[next].get();
        threadIdx = engine.self->index;
        engine.self->fiber.enter();
    }
    engine.self = nullptr;
}

}  // namespace

void fail(const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    engine.failed = true;
    engine.report = text;
    if (!engine.self) std::abort();  // a device function was called outside a kernel
    const uint3 t = engine.self->index;
    std::snprintf(text, sizeof text, " [block (%u,%u,%u), thread (%u,%u,%u)]", blockIdx.x, blockIdx.y, blockIdx.z, t.x,
                  t.y, t.z);
    engine.report += text;
    engine.self->fiber.leave_for_good();  // the grid is abandoned
}

const char* report() { return engine.report.c_str(); }
bool failed() { return engine.failed; }
void reset() { engine.failed = false, engine.report.clear(); }
void refuse(const char* why) { engine.failed = true, engine.report = why; }
void set_order(Order order, uint64_t seed) {
    engine.order = order;
    engine.seed = seed * 0x9E3779B97F4A7C15u + 88172645463325252u;
}

int lane() { return engine.self->linear & 31; }
bool inside_kernel() { return engine.self && !engine.failed; }
Position position() {
    const int t = engine.self->linear;
    return {engine.launch, engine.block, static_cast<uint16_t>(t), engine.epoch, engine.warps[t / 32].epoch};
}

SharedSpan shared_span() { return {engine.shared, engine.shared_top, engine.dynamic_bytes}; }
bool inside_shared_object(size_t offset, size_t bytes) {
    if (offset + bytes <= engine.dynamic_bytes) return true;
    for (const auto& [key, place] : engine.statics) {
        if (offset >= place.first && offset + bytes <= place.first + place.second) return true;
    }
    return false;
}

void* dynamic_shared() { return engine.shared; }
void* static_shared(const void* key, size_t bytes, size_t align, const char* name) {
    auto found = engine.statics.find(key);
    if (found == engine.statics.end()) {
        constexpr size_t gap = 16;  // between objects, so that running off one is seen
        const size_t offset = (engine.shared_top + gap + align - 1) / align * align;
        engine.shared_top = offset + bytes;
        engine.static_bytes += bytes;
        if (engine.static_bytes > kStaticSharedBytes) fail("more than 48 KiB of static shared memory at %s", name);
        if (engine.shared_top > kSharedBytes) fail("more than 227 KiB of shared memory at %s", name);
        found = engine.statics.emplace(key, std::pair(offset, bytes)).first;
    }
    return engine.shared + found->second.first;
}

void warp_collective(Collective kind, unsigned mask, void* operand, Combine combine, const char* file, int line) {
    Thread& me = *engine.self;
    const int l = lane();
    Warp& warp = engine.warps[me.linear / 32];
    if (!(mask >> l & 1)) fail("lane %d is not in its own mask %08x at %s:%d", l, mask, file, line);
    if (kind == mma && warp.alive != 0xffffffffu)
        fail("mma with exited lanes (alive %08x) at %s:%d", warp.alive, file, line);
    me.file = file, me.line = line;
    warp.lanes[l] = {kind, mask, operand, combine, true};
    if (!try_collective(warp, me.linear & ~31, mask, kind, l)) wait(State::in_collective, file, line);
}

int block_barrier(int predicate, Vote vote, const char* file, int line) {
    if (!engine.waiting) {
        engine.vote = vote, engine.votes = vote == all;
        engine.barrier_file = file, engine.barrier_line = line;
    } else if (engine.vote != vote || engine.barrier_line != line || std::strcmp(engine.barrier_file, file) != 0) {
        fail("divergent __syncthreads: some threads at %s:%d, this one at %s:%d", engine.barrier_file,
             engine.barrier_line, file, line);
    }
    engine.votes = vote == any   ? engine.votes | predicate
                   : vote == all ? engine.votes & predicate
                                 : engine.votes + predicate;
    if (++engine.waiting == engine.alive) {
        const int votes = engine.votes;
        release_barrier();
        return votes;
    }
    wait(State::at_barrier, file, line);
    return engine.self->vote;
}

bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, Body body, void* closure, const char* kernel) {
    const std::lock_guard lock(engine.mutex);
    if (engine.failed) return false;  // like a real device, until reset
    if (!engine.shared) {
        void* p = mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        engine.shared = static_cast<char*>(p);
    }
    engine.count = static_cast<int>(block.x * block.y * block.z);
    while (engine.threads.size() < static_cast<size_t>(engine.count))
        engine.threads.push_back(std::make_unique<Thread>());
    engine.body = body, engine.closure = closure;
    blockDim = block, gridDim = grid;
    ++engine.launch;
    engine.block = 0;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                begin_block({x, y, z}, dynamic_bytes);
                run_block();
                if (!engine.failed) continue;
                engine.report = std::string(kernel) + ": " + engine.report;
                return false;
            }
        }
    }
    return true;
}

}  // namespace emulation
