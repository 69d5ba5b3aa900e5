// The checked build: kernels are compiled with -fsanitize=thread but linked to the hooks below instead of libtsan.
// Every byte of shared and device memory has a cell that remembers who touched it last: races (two threads, no barrier
// in between), accesses outside an object, and reads of what no one wrote are errors.
#include "engine.h"

#if !defined(PYQLORA_EMULATION_CHECKED)

namespace emulation::checks {
void access(const void*, size_t, bool) {}
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
    bool initialised;
};
std::vector<Cell> shared_cells;
Cell* device_cells = nullptr;  // one a byte of the arena, mapped lazily

Cell* device_cell(const void* p) { return device_cells + (static_cast<const char*>(p) - device_span().begin); }

// Same launch, another thread, and no barrier that both passed between the two.
bool unordered(const Touch& before, const Position& now) {
    const Position& who = before.who;
    if (!before.set || who.launch != now.launch) return false;
    if (who.block != now.block) return true;
    if (who.thread == now.thread || who.epoch != now.epoch) return false;
    return who.thread / 32 != now.thread / 32 || who.warp_epoch == now.warp_epoch;
}

// The cells of an access, after the bounds check; null for memory that is the host's (kernel arguments, stacks).
Cell* cells_of(const char* p, size_t bytes, bool write, const char*& space, size_t& offset) {
    const char* verb = write ? "write" : "read";
    const SharedSpan shared = shared_span();
    if (p >= shared.begin && p < shared.begin + kSharedBytes) {
        space = "shared", offset = p - shared.begin;
        if (!inside_shared_object(offset, bytes))
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
    for (size_t i = 0; i < bytes; ++i) cell[i] = Cell{{}, {}, {}, true};
}

void access(const void* p, size_t bytes, bool write) {
    if (!inside_kernel()) return;
    const char* space = "";
    size_t offset = 0;
    Cell* cell = cells_of(static_cast<const char*>(p), bytes, write, space, offset);
    if (!cell) return;
    const Position me = position();
    auto race = [&](const Touch& other, const char* first, const char* second, size_t at) {
        fail(
            "data race in %s memory +0x%zx: %s by thread %u of block %u, then %s by thread %u of block %u, no barrier "
            "in between",
            space, at, first, other.who.thread, other.who.block - 1, second, me.thread, me.block - 1);
    };
    for (size_t i = 0; i < bytes; ++i, ++cell) {
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
#define EMULATION_HOOK(bytes)                                                          \
    extern "C" void __tsan_read##bytes(void* p) { access(p, bytes, false); }           \
    extern "C" void __tsan_write##bytes(void* p) { access(p, bytes, true); }           \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false); } \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true); }
EMULATION_HOOK(1)
EMULATION_HOOK(2)
EMULATION_HOOK(4)
EMULATION_HOOK(8)
EMULATION_HOOK(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

#endif
