// What the checked build counts on request: how a warp's accesses fall on the 32 banks of shared memory and on the
// 32-byte sectors of device memory. The accesses of a warp's lanes that come from one instruction and are its n-th
// there are one request of the hardware.
#include "counts.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "engine.h"

namespace emulation::counts {
namespace {

struct Access {
    uintptr_t address;
    int lane;
};
struct Instruction {
    size_t bytes;
    bool write, shared;
    std::map<int, size_t> seen;                                      // a thread's accesses so far
    std::map<std::pair<int, size_t>, std::vector<Access>> requests;  // by warp and number
};
bool on = false;
// Of the block that is running, by place in the code; one place may serve shared memory and device memory.
std::map<std::pair<const void*, bool>, Instruction> instructions;
std::vector<Total> totals;

// Shared memory serves 128 bytes at a time, each bank one word: 32 lanes of 4 bytes, 16 of 8, 8 of 16.
size_t wavefronts(const std::vector<Access>& request, size_t bytes) {
    const int lanes = static_cast<int>(128 / std::max<size_t>(bytes, 4));
    size_t count = 0;
    for (int first = 0; first < 32; first += lanes) {
        std::array<std::set<uintptr_t>, 32> words;
        for (const Access& a : request) {
            if (a.lane < first || a.lane >= first + lanes) continue;
            for (uintptr_t w = a.address / 4; w <= (a.address + bytes - 1) / 4; ++w) words[w % 32].insert(w);
        }
        size_t most = 0;
        for (const auto& bank : words) most = std::max(most, bank.size());
        count += most;
    }
    return count;
}

// What the request would take if its distinct bytes lay side by side.
size_t ideal(const std::vector<Access>& request, size_t bytes, size_t unit) {
    std::set<uintptr_t> distinct;
    for (const Access& a : request) distinct.insert(a.address);
    return (distinct.size() * bytes + unit - 1) / unit;
}

size_t sectors(const std::vector<Access>& request, size_t bytes) {
    std::set<uintptr_t> touched;
    for (const Access& a : request) {
        for (uintptr_t s = a.address / 32; s <= (a.address + bytes - 1) / 32; ++s) touched.insert(s);
    }
    return touched.size();
}

}  // namespace

void end_block() {
    for (const auto& [place, instruction] : instructions) {
        Total total{instruction.shared, instruction.write, instruction.bytes, 0, 0, 0};
        for (const auto& [key, request] : instruction.requests) {
            ++total.requests;
            total.taken +=
                instruction.shared ? wavefronts(request, instruction.bytes) : sectors(request, instruction.bytes);
            total.ideal += ideal(request, instruction.bytes, instruction.shared ? 128 : 32);
        }
        totals.push_back(total);
    }
    instructions.clear();
}

void note(const void* pc, const void* p, size_t bytes, bool write) {
    if (!on || !inside_kernel() || !(is_shared(p) || is_device(p))) return;
    const int thread = position().thread;
    const bool shared = is_shared(p);
    Instruction& at = instructions.try_emplace({pc, shared}, Instruction{bytes, write, shared, {}, {}}).first->second;
    at.requests[{thread / 32, at.seen[thread]++}].push_back({reinterpret_cast<uintptr_t>(p), thread % 32});
}

void start() { on = true, totals.clear(), instructions.clear(); }
std::vector<Total> stop() {
    on = false;
    return totals;
}

}  // namespace emulation::counts
