#include <sys/mman.h>
#include <unistd.h>

#include "ops/paged.h"

namespace pyqlora::cpu {

void prefetch(const PrefetchArgs& a, int) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<uintptr_t>(a.tensor.data) & ~(page - 1);
    const auto bytes = reinterpret_cast<uintptr_t>(a.tensor.data) + a.tensor.bytes() - begin;
    // Advice: a kernel that knows no such thing, or memory that has no file, changes nothing but the speed.
#if defined(MADV_PAGEOUT)
    madvise(reinterpret_cast<void*>(begin), bytes, a.to_cpu ? MADV_PAGEOUT : MADV_WILLNEED);
#else
    if (!a.to_cpu) madvise(reinterpret_cast<void*>(begin), bytes, MADV_WILLNEED);
#endif
}

}  // namespace pyqlora::cpu
