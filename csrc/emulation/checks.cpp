// The checked build: kernels are compiled with -fsanitize=thread but linked to the hooks below instead of libtsan.
// Every byte of shared and device memory has a cell that remembers who touched it last: races (two threads, no barrier
// in between), misaligned accesses and those outside an object, reads of what no one wrote, and any touch of what a
// cp.async has yet to deliver are errors.
#include "counts.h"
#include "engine.h"

#if !defined(PYQLORA_EMULATION_CHECKED)

namespace emulation::checks {
void access(const void*, size_t, bool) {}
void access(const void*, size_t, bool, int) {}
void in_flight(void*, size_t, bool) {}
void begin_block() {}
void allocated(void*, size_t) {}
void written_by_host(void*, size_t) {}
}  // namespace emulation::checks

#else

#include <sys/mman.h>

#include <cstring>
#include <vector>

namespace emulation::checks {
namespace {

struct Touch {
    Position who;
    bool set;
};
struct Cell {
    Touch write, read, other_read;
    bool initialised, in_flight;
};
std::vector<Cell> shared_cells;
Cell* device_cells = nullptr;  // one a byte of the arena, mapped lazily

Cell* device_cell(const void* p) { return device_cells + (static_cast<const char*>(p) - device_span().begin); }

// Same launch, another thread, and no barrier that both passed between the two.
bool unordered(const Touch& before, const Position& now) {
    const Position& who = before.who;
    if (!before.set || who.launch != now.launch) return false;
    if (who.block != now.block) return true;
    return who.thread != now.thread && !barrier_between(who, now);
}

// The cells of an access, after the bounds check; null for memory that is the host's (kernel arguments, stacks).
Cell* cells_of(const char* p, size_t bytes, bool write, const char*& space, size_t& offset) {
    const char* verb = write ? "write" : "read";
    if (is_shared(p)) {
        space = "shared", offset = shared_offset(p);
        if (!inside_shared_object(p, bytes))
            fail("out-of-bounds shared %s of %zu bytes at +0x%zx", verb, bytes, offset);
        return &shared_cells[offset];
    }
    const DeviceSpan device = device_span();
    if (p >= device.begin && p < device.begin + device.bytes) {
        space = "device";
        const DeviceSpan a = allocation_below(p);
        offset = p - (a.begin ? a.begin : device.begin);
        if (!is_device(p, bytes))
            fail("out-of-bounds device %s of %zu bytes at +%zu of an allocation of %zu", verb, bytes, offset, a.bytes);
        return device_cell(p);
    }
    return nullptr;
}

}  // namespace

void begin_block() { shared_cells.assign(kSharedBytes, Cell{}); }

void allocated(void* p, size_t bytes) {
    if (!device_cells) {
        void* cells = mmap(nullptr, device_span().bytes * sizeof(Cell), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        device_cells = static_cast<Cell*>(cells);
    }
    std::memset(static_cast<void*>(device_cell(p)), 0, bytes * sizeof(Cell));
}

void written_by_host(void* p, size_t bytes) {
    Cell* cell = device_cell(p);
    for (size_t i = 0; i < bytes; ++i) cell[i] = Cell{{}, {}, {}, true, false};
}

void in_flight(void* p, size_t bytes, bool on) {
    for (size_t i = 0; i < bytes; ++i) shared_cells[shared_offset(p) + i].in_flight = on;
}

void access(const void* p, size_t bytes, bool write) {
    if (inside_kernel()) access(p, bytes, write, lane());
}
void access(const void* p, size_t bytes, bool write, int lane) {
    const char* space = "";
    size_t offset = 0;
    Cell* cell = cells_of(static_cast<const char*>(p), bytes, write, space, offset);
    if (!cell) return;
    const Position me = position(lane);
    auto race = [&](const Touch& other, const char* first, const char* second, size_t at) {
        fail(
            "data race in %s memory +0x%zx: %s by thread %u of block %u, then %s by thread %u of block %u, no barrier "
            "in between",
            space, at, first, other.who.thread, other.who.block - 1, second, me.thread, me.block - 1);
    };
    for (size_t i = 0; i < bytes; ++i, ++cell) {
        if (cell->in_flight)
            fail("%s shared memory +0x%zx before the wait for its cp.async", write ? "write to" : "read of",
                 offset + i);
        if (unordered(cell->write, me)) race(cell->write, "write", write ? "write" : "read", offset + i);
        if (write) {
            if (unordered(cell->read, me)) race(cell->read, "read", "write", offset + i);
            if (unordered(cell->other_read, me)) race(cell->other_read, "read", "write", offset + i);
            cell->write = {me, true};
            cell->initialised = true;
        } else {
            if (!cell->initialised) fail("read of uninitialised %s memory +0x%zx", space, offset + i);
            // Two readers are remembered, so that one by another thread is not forgotten.
            (unordered(cell->read, me) ? cell->other_read : cell->read) = {me, true};
        }
    }
}

}  // namespace emulation::checks

using emulation::checks::access;
// On the stack the host's compiler may join members to a wider access, of which it knows that it need not be aligned.
static bool on_stack(void* p) {
    const auto device = emulation::device_span();
    return !emulation::is_shared(p) && (p < device.begin || p >= device.begin + device.bytes);
}
static void hook(void* p, size_t bytes, bool write, bool aligned, void* instruction) {
    if (aligned && reinterpret_cast<uintptr_t>(p) % bytes && emulation::inside_kernel() && !on_stack(p))
        emulation::fail("%zu-byte access at the misaligned address %p", bytes, p);
    access(p, bytes, write);
    emulation::counts::note(instruction, p, bytes, write);
}
#define EMULATION_CALLER __builtin_return_address(0)
#define EMULATION_HOOK(n)                                                                             \
    extern "C" void __tsan_read##n(void* p) { hook(p, n, false, true, EMULATION_CALLER); }            \
    extern "C" void __tsan_write##n(void* p) { hook(p, n, true, true, EMULATION_CALLER); }            \
    extern "C" void __tsan_unaligned_read##n(void* p) { hook(p, n, false, false, EMULATION_CALLER); } \
    extern "C" void __tsan_unaligned_write##n(void* p) { hook(p, n, true, false, EMULATION_CALLER); }
EMULATION_HOOK(1)
EMULATION_HOOK(2)
EMULATION_HOOK(4)
EMULATION_HOOK(8)
EMULATION_HOOK(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { hook(p, bytes, false, false, EMULATION_CALLER); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { hook(p, bytes, true, false, EMULATION_CALLER); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

#endif
