// cp.async: copies from device to shared memory that are complete only after their thread has waited for their group.
// When the bytes move before that is the hardware's choice, here that of set_copies: at once, or only at the wait.
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "engine.h"

namespace emulation {
namespace {

struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;  // zeros after `valid`
};
using Group = std::vector<Copy>;
struct Pipeline {
    Group open;
    std::deque<Group> committed;
};
std::vector<Pipeline> pipelines;  // a thread's
Copies mode = Copies::late;

void move(const Copy& c) {
    std::memcpy(c.to, c.from, c.valid);
    std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
}

}  // namespace

void set_copies(Copies when) { mode = when; }
void begin_copies(int threads) { pipelines.assign(threads, Pipeline{}); }

void copy_async(void* to, const void* from, size_t bytes, size_t valid, const char* file, int line) {
    if (!inside_shared_object(to, bytes)) fail("cp.async to outside of shared memory at %s:%d", file, line);
    if (valid && !is_device(from, valid)) fail("cp.async from outside of device memory at %s:%d", file, line);
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        fail("misaligned cp.async of %zu bytes from %p to %p at %s:%d", bytes, from, to, file, line);
    checks::access(from, valid, false);
    checks::access(to, bytes, true);
    checks::in_flight(to, bytes, true);
    const Copy copy{to, from, bytes, valid};
    if (mode == Copies::early) move(copy);
    pipelines[position().thread].open.push_back(copy);
}

void commit_copies() {
    Pipeline& mine = pipelines[position().thread];
    mine.committed.push_back(std::move(mine.open));
    mine.open.clear();
}

void wait_copies(size_t pending) {
    Pipeline& mine = pipelines[position().thread];
    for (; mine.committed.size() > pending; mine.committed.pop_front()) {
        for (const Copy& c : mine.committed.front()) {
            if (mode == Copies::late) move(c);
            checks::in_flight(c.to, c.bytes, false);
            checks::access(c.to, c.bytes, true);  // from here on others may read after a barrier
        }
    }
}

}  // namespace emulation
