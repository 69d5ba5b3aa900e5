// How the accesses of warps fall on shared memory's banks and device memory's sectors; of the checked build.
#pragma once
#include <cstddef>
#include <vector>

namespace emulation::counts {

struct Total {  // of an instruction in a block
    bool shared, write;
    size_t bytes;         // a lane's
    size_t requests;      // warps that executed it, each time
    size_t taken, ideal;  // wavefronts of shared memory, or sectors of device memory
};

void start();
std::vector<Total> stop();  // what there was since start()
void note(const void* instruction, const void* p, size_t bytes, bool write);
void end_block();

}  // namespace emulation::counts
