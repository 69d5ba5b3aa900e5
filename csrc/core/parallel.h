// parallel_for over the threads of torch's own operators, in its OpenMP runtime: between two operators they wait awake
// for a while, and threads of another pool would fight with them for the cores. Where there is no such runtime, and in
// forked processes, over a pool of our own. The caller says how many threads to use (torch's count) and takes part.
#pragma once
#include <cstdint>
#include <functional>

namespace pyqlora::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each a multiple of `grain` long but the last.
// With threads <= 1 or a single grain: one call on this thread. An exception from any range is rethrown here.
void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace pyqlora::cpu
