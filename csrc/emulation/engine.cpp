#include "engine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counts.h"
#include "cuda_runtime.h"
#include "fiber.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace emulation {
namespace {

enum class State : uint8_t { ready, at_barrier, at_named_barrier, in_collective, finished };

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
// Of each warp, how many barriers it is known to have passed (a vector clock): what it did before them is done.
constexpr int kMaxWarps = 32;
struct Clock {
    uint16_t of[kMaxWarps] = {};
    void learn(const Clock& other) {
        for (int w = 0; w < kMaxWarps; ++w) of[w] = std::max(of[w], other.of[w]);
    }
};
struct Warp {
    unsigned alive = 0;
    uint16_t epoch = 0;
    Clock clock;
    Arrival lanes[32] = {};
};
struct NamedBarrier {
    int expected = 0, arrived = 0;  // threads
    unsigned waiting = 0;           // warps
    uint32_t releases = 0;
    Clock joined;
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
    const char* barrier_file = "";
    int barrier_line = 0;
    NamedBarrier named[16];

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
    Clock joined;
    for (size_t w = 0; w < engine.warps.size(); ++w) {
        ++engine.warps[w].clock.of[w];
        joined.learn(engine.warps[w].clock);
    }
    for (Warp& w : engine.warps) w.clock = joined;
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
    const char* what = t.state == State::at_barrier         ? "at __syncthreads"
                       : t.state == State::at_named_barrier ? "at a named barrier"
                                                            : "in a warp collective";
    char text[256];
    std::snprintf(text, sizeof text, "\n  thread (%u,%u,%u) %s %s:%d", t.index.x, t.index.y, t.index.z, what, t.file,
                  t.line);
    return text;
}

void begin_block(uint3 index, size_t dynamic_bytes) {
    blockIdx = index;
    ++engine.block;
    begin_shared(dynamic_bytes);
    begin_copies(engine.count);
    checks::begin_block();
    engine.warps.assign((engine.count + 31) / 32, Warp{});
    engine.ready.clear();
    engine.alive = engine.count;
    engine.waiting = 0;
    for (NamedBarrier& b : engine.named) b = {};
    for (size_t w = 0; w < engine.warps.size(); ++w) engine.warps[w].clock.of[w] = 1;
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
Position position() { return position(lane()); }
Position position(int lane) {
    const int w = engine.self->linear / 32;
    const Warp& warp = engine.warps[w];
    return {engine.launch, engine.block, static_cast<uint16_t>(w * 32 + lane), warp.clock.of[w], warp.epoch};
}
bool barrier_between(const Position& before, const Position& now) {
    const int w = before.thread / 32;
    if (engine.warps[now.thread / 32].clock.of[w] > before.clock) return true;
    return w == now.thread / 32 && before.warp_epoch != now.warp_epoch;
}

void warp_collective(Collective kind, unsigned mask, void* operand, Combine combine, const char* file, int line) {
    Thread& me = *engine.self;
    const int l = lane();
    Warp& warp = engine.warps[me.linear / 32];
    if (!(mask >> l & 1)) fail("lane %d is not in its own mask %08x at %s:%d", l, mask, file, line);
    if ((kind == mma || kind == ldmatrix) && warp.alive != 0xffffffffu)
        fail("mma or ldmatrix with exited lanes (alive %08x) at %s:%d", warp.alive, file, line);
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

namespace {
struct NamedArrival {
    int id, threads;
    bool wait;
    uint32_t release;  // out: the barrier's count of releases that ends the wait
};

// Once for a warp: it arrives, and the last to arrive lets the others go.
void arrive(unsigned lanes, void* const* operands) {
    const auto& first = *static_cast<NamedArrival*>(operands[__builtin_ctz(lanes)]);
    for (int l = 0; l < 32; ++l) {
        const auto* a = lanes >> l & 1 ? static_cast<NamedArrival*>(operands[l]) : &first;
        if (a->id != first.id || a->threads != first.threads || a->wait != first.wait)
            fail("lanes of one warp arrive at different named barriers");
    }
    NamedBarrier& barrier = engine.named[first.id];
    if (barrier.arrived && barrier.expected != first.threads)
        fail("named barrier %d of %d threads meets one of %d", first.id, barrier.expected, first.threads);
    barrier.expected = first.threads;
    barrier.arrived += 32;
    const int w = engine.self->linear / 32;
    ++engine.warps[w].clock.of[w];
    barrier.joined.learn(engine.warps[w].clock);
    if (first.wait) barrier.waiting |= 1u << w;
    for (int l = 0; l < 32; ++l) {
        if (lanes >> l & 1) static_cast<NamedArrival*>(operands[l])->release = barrier.releases + 1;
    }
    if (barrier.arrived < barrier.expected) return;
    for (size_t other = 0; other < engine.warps.size(); ++other) {
        if (!(barrier.waiting >> other & 1)) continue;
        engine.warps[other].clock.learn(barrier.joined);
        for (size_t i = other * 32; i < std::min<size_t>(other * 32 + 32, engine.count); ++i) {
            if (engine.threads[i]->state == State::at_named_barrier) make_ready(static_cast<int>(i));
        }
    }
    const uint32_t releases = barrier.releases + 1;
    barrier = {};
    barrier.releases = releases;
}
}  // namespace

void warp_barrier(int id, int threads, bool wait_there, const char* file, int line) {
    if (id < 1 || id > 15) fail("named barrier %d: expected 1 to 15 at %s:%d", id, file, line);
    if (threads < 1 || threads % 32)
        fail("named barrier of %d threads: expected whole warps at %s:%d", threads, file, line);
    NamedArrival arrival{id, threads, wait_there, 0};
    warp_collective(named_barrier, 0xffffffffu, &arrival, arrive, file, line);
    if (wait_there && engine.named[id].releases < arrival.release) wait(State::at_named_barrier, file, line);
}

bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, Body body, void* closure) {
    const std::lock_guard lock(engine.mutex);
    if (engine.failed) return false;  // like a real device, until reset
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
                counts::end_block();
                if (engine.failed) return false;
            }
        }
    }
    return true;
}

}  // namespace emulation
