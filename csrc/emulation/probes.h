// Small kernels, each about one thing that a GPU offers: used rightly (misuse 0), and wrongly in numbered ways.
#pragma once
#include <string>

namespace pyqlora::cuda {

constexpr int kProbeThreads = 128, kProbeInts = 4 * kProbeThreads;

// in, out: kProbeInts ints of device memory each.
void probe(const std::string& name, int misuse, const int* in, int* out, void* stream);

}  // namespace pyqlora::cuda
