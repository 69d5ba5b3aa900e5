// The machine behind the stand-in headers: every CUDA thread is a fiber, blocks run one after another, and whatever a
// GPU would punish is an error with file, line, block and thread.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3;

// Every collective knows the line that called it.
#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulation {

enum Collective : int { sync_warp = 1, shuffle, ballot, mma, ldmatrix, named_barrier };
using Combine = void (*)(unsigned lanes, void* const* operands);

// ---- called by kernels --------------------------------------------------------------------------------------------
// Every lane of `mask` leaves its operand and waits; the last to arrive computes for all of them.
void warp_collective(Collective kind, unsigned mask, void* operand, Combine combine, const char* file, int line);
enum Vote : int { none, any, all, count };
int block_barrier(int predicate, Vote vote, const char* file, int line);
// bar.sync and bar.arrive: barrier `id` (1 to 15) of `threads` threads, counted in whole warps.
void warp_barrier(int id, int threads, bool wait, const char* file, int line);
void* static_shared(const void* key, size_t bytes, size_t align, const char* name);
void* dynamic_shared();
void copy_async(void* to, const void* from, size_t bytes, size_t valid, const char* file, int line);
void commit_copies();
void wait_copies(size_t pending);  // until only this many of the thread's groups are not complete
int lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launches -----------------------------------------------------------------------------------------------------
using Body = void (*)(void* closure);
// Runs the grid; false when a thread failed, and then report() says why.
bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, Body body, void* closure);
const char* report();
bool failed();
void reset();
void refuse(const char* why);  // makes it the report of a launch that did not start
enum class Order { forward, reverse, random };
void set_order(Order order, uint64_t seed);  // in which order ready threads run
enum class Copies { late, early };
void set_copies(Copies when);  // cp.async moves its bytes at the wait, or at once

// ---- shared memory (shared.cpp), copies into it (copies.cpp) --------------------------------------------------------
constexpr size_t kSharedBytes = 227 << 10, kStaticSharedBytes = 48 << 10;
bool set_dynamic_limit(const void* kernel, size_t bytes);       // cudaFuncSetAttribute; false: too much
bool dynamic_shared_allowed(const void* kernel, size_t bytes);  // for the launch that follows
void begin_shared(size_t dynamic_bytes);                        // of a block
void begin_copies(int threads);
bool is_shared(const void* p);
size_t shared_offset(const void* p);
bool inside_shared_object(const void* p, size_t bytes);

// ---- device memory (memory.cpp) -----------------------------------------------------------------------------------
// Filled with 0xFF, flush with an inaccessible page, never reused. everywhere: all devices reach it.
void* allocate(size_t bytes, int device, bool everywhere = false);
bool release(void* p);
bool is_device(const void* p, size_t bytes = 1);  // inside a live allocation
int device_of(const void* p);                     // of its allocation; 0 for what is none
int current_device();
void set_device_count(int count);

// ---- checks (checks.cpp; empty but in the checked build) ----------------------------------------------------------
namespace checks {
void access(const void* p, size_t bytes, bool write);
void access(const void* p, size_t bytes, bool write, int lane);  // by another lane of the running thread's warp
void in_flight(void* p, size_t bytes, bool on);                  // a cp.async writes there until its wait
void begin_block();
void allocated(void* p, size_t bytes);
void written_by_host(void* p, size_t bytes);
}  // namespace checks

// What the checks need to know of a thread.
struct Position {
    uint32_t launch, block;
    uint16_t thread, clock, warp_epoch;  // barriers that its warp, and __syncwarp that all of its warp have passed
};
bool inside_kernel();
Position position();
Position position(int lane);  // of another lane of the running thread's warp
// Whether a barrier orders what a thread of this block did at `before` before what one does at `now`.
bool barrier_between(const Position& before, const Position& now);
struct DeviceSpan {
    char* begin;
    size_t bytes;
};
DeviceSpan device_span();  // the whole arena
// The allocation at or below p; {nullptr, 0} if none.
DeviceSpan allocation_below(const void* p);

}  // namespace emulation
