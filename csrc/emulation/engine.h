// The machine behind the stand-in headers: every CUDA thread is a fiber, blocks run one after another, and whatever a
// GPU would punish is an error with file, line, block and thread.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3;

// Every collective knows the line that called it.
#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulation {

enum Collective : int { sync_warp = 1, shuffle, ballot, reduce, mma };
using Combine = void (*)(unsigned lanes, void* const* operands);

// ---- called by kernels --------------------------------------------------------------------------------------------
// Every lane of `mask` leaves its operand and waits; the last to arrive computes for all of them.
void warp_collective(Collective kind, unsigned mask, void* operand, Combine combine, const char* file, int line);
enum Vote : int { none, any, all, count };
int block_barrier(int predicate, Vote vote, const char* file, int line);
void* static_shared(const void* key, size_t bytes, size_t align, const char* name);
void* dynamic_shared();
int lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launches -----------------------------------------------------------------------------------------------------
using Body = void (*)(void* closure);
// Runs the grid; false when a thread failed, and then report() says why.
bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, Body body, void* closure, const char* kernel);
const char* report();
bool failed();
void reset();
void refuse(const char* why);  // makes it the report of a launch that did not start
enum class Order { forward, reverse, random };
void set_order(Order order, uint64_t seed);  // in which order ready threads run

constexpr size_t kSharedBytes = 227 << 10, kStaticSharedBytes = 48 << 10;

// ---- device memory (memory.cpp) -----------------------------------------------------------------------------------
void* allocate(size_t bytes);  // filled with 0xFF, flush with an inaccessible page, never reused
bool release(void* p);
bool is_device(const void* p, size_t bytes = 1);  // inside a live allocation

// ---- checks (checks.cpp; empty but in the checked build) ----------------------------------------------------------
namespace checks {
void access(const void* p, size_t bytes, bool write);
void begin_block();
void allocated(void* p, size_t bytes);
void written_by_host(void* p, size_t bytes);
}  // namespace checks

// What the checks need to know of the running thread.
struct Position {
    uint32_t launch, block;
    uint16_t thread, epoch, warp_epoch;
};
bool inside_kernel();
Position position();
struct SharedSpan {
    char* begin;
    size_t end;            // one past the last byte in use
    size_t dynamic_bytes;  // the first bytes, if any
};
SharedSpan shared_span();
bool inside_shared_object(size_t offset, size_t bytes);
struct DeviceSpan {
    char* begin;
    size_t bytes;
};
DeviceSpan device_span();  // the whole arena
// The allocation at or below p; {nullptr, 0} if none.
DeviceSpan allocation_below(const void* p);

}  // namespace emulation
