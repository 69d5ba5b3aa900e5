// parallel_for over a small pool of our own threads. The caller says how many to use (torch's count), takes part
// itself, and blocks (never spins) for the rest, so that the pool does not fight with torch's for the cores.
#pragma once
#include <cstdint>
#include <functional>

namespace pyqlora::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each a multiple of `grain` long but the last.
// With threads <= 1 or a single grain: one call on this thread. An exception from any range is rethrown here.
void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace pyqlora::cpu
