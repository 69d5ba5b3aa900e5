#include "core/output_memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyqlora::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLargestKept = 128 << 20;

struct Mapping {
    void* data;
    int64_t capacity;
};

std::atomic<Mapping*> idle{nullptr};  // at most one; exchanged as a whole, so that no lock is held across a fork

void unmap(Mapping* mapping) {
    if (!mapping) return;
    munmap(mapping->data, mapping->capacity);
    delete mapping;
}

// Starts at a huge page, whose 2 MiB take one fault and one entry of the TLB where 4 KiB pages take 512.
void* map(int64_t capacity) {
    const int64_t reserved = capacity + kHugePage;
    void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::runtime_error("out of memory: " + std::to_string(capacity) + " bytes");
    const auto start = reinterpret_cast<uintptr_t>(base);
    const int64_t before = (kHugePage - start % kHugePage) % kHugePage;
    auto* data = static_cast<char*>(base) + before;
    if (before) munmap(base, before);
    munmap(data + capacity, reserved - before - capacity);
#ifdef MADV_HUGEPAGE
    madvise(data, capacity, MADV_HUGEPAGE);
#endif
#ifdef MADV_POPULATE_WRITE
    madvise(data, capacity, MADV_POPULATE_WRITE);  // all faults in one call; where it is refused, they come one by one
#endif
    return data;
}

}  // namespace

OutputMemory::OutputMemory(int64_t bytes) : bytes_(bytes) {
    const int64_t needed = (bytes + kPage - 1) / kPage * kPage;
    Mapping* mapping = idle.exchange(nullptr);
    if (mapping && mapping->capacity >= needed && mapping->capacity <= needed + needed / 4) {
        data_ = mapping->data, capacity_ = mapping->capacity;
        delete mapping;
    } else {
        unmap(mapping);
        data_ = map(needed), capacity_ = needed;
    }
}

OutputMemory::~OutputMemory() {
    auto* mapping = new Mapping{data_, capacity_};
    unmap(capacity_ <= kLargestKept ? idle.exchange(mapping) : mapping);
}

}  // namespace pyqlora::cpu
