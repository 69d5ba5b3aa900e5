// Which instruction set the CPU kernels use: the best the machine has, or the one PYQLORA_CPU names.
#pragma once
#include <string>
#include <vector>

namespace pyqlora::cpu {

enum class Isa { scalar, avx2, avx512 };  // ascending; avx2 means AVX2+FMA+F16C, avx512 means F+BW+VL+DQ

const char* name(Isa isa);
std::vector<Isa> supported_isas();      // of this machine, ascending
Isa active_isa();                       // chosen on first use; ValueError for an unknown or unsupported PYQLORA_CPU
void set_isa(const std::string& text);  // for tests and benchmarks; "" goes back to the first choice

#if defined(__x86_64__)
#define PYQLORA_AVX2 __attribute__((target("avx2,fma,f16c")))
#define PYQLORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif

}  // namespace pyqlora::cpu
