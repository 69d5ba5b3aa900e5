#include "core/output_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyqlora::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kHeldOnTo = 128 << 20;

struct Mapping {
    void* data;
    int64_t capacity;
};

std::vector<Mapping> idle;  // in the order they were freed
int64_t idle_bytes = 0, used_bytes = 0, most_used_bytes = 0;

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

Mapping take(std::vector<Mapping>::iterator which) {
    const Mapping mapping = *which;
    idle.erase(which);
    idle_bytes -= mapping.capacity;
    return mapping;
}

// Starts at a huge page if it holds one, whose 2 MiB take one fault and one entry of the TLB where 4 KiB pages take
// 512.
void* map(int64_t capacity) {
    const int64_t slack = capacity < kHugePage ? 0 : kHugePage;
    void* base = mmap(nullptr, capacity + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::runtime_error("out of memory: " + std::to_string(capacity) + " bytes");
    const int64_t past = reinterpret_cast<uintptr_t>(base) % kHugePage;
    const int64_t before = slack && past ? kHugePage - past : 0;
    auto* data = static_cast<char*>(base) + before;
    if (before) munmap(base, before);
    if (slack) munmap(data + capacity, slack - before);
#ifdef MADV_HUGEPAGE
    madvise(data, capacity, MADV_HUGEPAGE);
#endif
#ifdef MADV_POPULATE_WRITE
    madvise(data, capacity, MADV_POPULATE_WRITE);  // all faults in one call; where it is refused, they come one by one
#endif
    return data;
}

}  // namespace

std::unique_ptr<OutputMemory> OutputMemory::reuse(int64_t bytes) {
    const int64_t needed = whole_pages(bytes);
    for (auto which = idle.end(); which != idle.begin();) {
        --which;
        if (which->capacity < needed || which->capacity > needed + needed / 4) continue;
        const Mapping found = take(which);
        return std::unique_ptr<OutputMemory>(new OutputMemory(found.data, bytes, found.capacity));
    }
    const int64_t allowed = std::max(most_used_bytes, used_bytes + needed);
    while (!idle.empty() && used_bytes + needed + idle_bytes > allowed) {
        const Mapping oldest = take(idle.begin());
        munmap(oldest.data, oldest.capacity);
    }
    return nullptr;
}

OutputMemory::OutputMemory(int64_t bytes) : bytes_(bytes), capacity_(whole_pages(bytes)) { data_ = map(capacity_); }

void OutputMemory::count() {
    used_bytes += capacity_;
    most_used_bytes = std::max(most_used_bytes, used_bytes);
}

OutputMemory::~OutputMemory() {
    used_bytes -= capacity_;
    idle.push_back({data_, capacity_});
    idle_bytes += capacity_;
#ifdef MADV_FREE
    if (idle_bytes > kHeldOnTo) madvise(data_, capacity_, MADV_FREE);
#endif
}

}  // namespace pyqlora::cpu
