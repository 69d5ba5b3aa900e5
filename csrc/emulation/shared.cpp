// Shared memory of the block that is running: the launch's dynamic bytes first, then each static object as it is
// reached, with gaps in between, so that running off one is seen.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "engine.h"

namespace emulation {
namespace {

struct Place {
    size_t offset, bytes;
};
struct Shared {
    char* memory = nullptr;
    size_t dynamic_bytes = 0, top = 0, static_bytes = 0, limit = 0;
    std::map<const void*, Place> statics;
};
Shared shared;
std::map<const void*, size_t> dynamic_limits;  // by kernel, where cudaFuncSetAttribute has set one

}  // namespace

bool set_dynamic_limit(const void* kernel, size_t bytes) {
    if (bytes > kSharedBytes) return false;
    dynamic_limits[kernel] = bytes;
    return true;
}
bool dynamic_shared_allowed(const void* kernel, size_t bytes) {
    const auto found = dynamic_limits.find(kernel);
    const size_t dynamic_limit = found == dynamic_limits.end() ? kStaticSharedBytes : found->second;
    shared.limit = dynamic_limit > kStaticSharedBytes ? kSharedBytes : kStaticSharedBytes;
    return bytes <= dynamic_limit;
}

void begin_shared(size_t dynamic_bytes) {
    if (!shared.memory) {
        void* p = mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        shared.memory = static_cast<char*>(p);
    }
    shared.statics.clear();
    shared.static_bytes = 0;
    shared.top = shared.dynamic_bytes = dynamic_bytes;
    std::memset(shared.memory, 0xff, kSharedBytes);  // NaN for whoever reads before writing
}

void* dynamic_shared() { return shared.memory; }
void* static_shared(const void* key, size_t bytes, size_t align, const char* name) {
    auto found = shared.statics.find(key);
    if (found == shared.statics.end()) {
        constexpr size_t gap = 16;
        const size_t offset = (shared.top + gap + align - 1) / align * align;
        shared.top = offset + bytes;
        shared.static_bytes += bytes;
        if (shared.static_bytes > kStaticSharedBytes) fail("more than 48 KiB of static shared memory at %s", name);
        if (shared.static_bytes + shared.dynamic_bytes > shared.limit || shared.top > kSharedBytes)
            fail("more than %zu KiB of shared memory at %s", shared.limit >> 10, name);
        found = shared.statics.emplace(key, Place{offset, bytes}).first;
    }
    return shared.memory + found->second.offset;
}

bool is_shared(const void* p) { return shared.memory && p >= shared.memory && p < shared.memory + kSharedBytes; }
size_t shared_offset(const void* p) { return static_cast<const char*>(p) - shared.memory; }
bool inside_shared_object(const void* p, size_t bytes) {
    if (!is_shared(p)) return false;
    const size_t offset = shared_offset(p);
    if (offset + bytes <= shared.dynamic_bytes) return true;
    for (const auto& [key, place] : shared.statics) {
        if (offset >= place.offset && offset + bytes <= place.offset + place.bytes) return true;
    }
    return false;
}

}  // namespace emulation
