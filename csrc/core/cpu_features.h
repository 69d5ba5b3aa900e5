// Which instruction set the CPU kernels use: the best the machine has, or the one PYQLORA_CPU names.
#pragma once
#include <string>
#include <vector>

namespace pyqlora::cpu {

enum class Isa { scalar, avx2, avx512 };  // ascending; avx2 means AVX2+FMA+F16C+BMI2, avx512 means F+BW+VL+DQ

const char* name(Isa isa);
std::vector<Isa> supported_isas();      // of this machine, ascending
Isa active_isa();                       // chosen on first use; ValueError for an unknown or unsupported PYQLORA_CPU
void set_isa(const std::string& text);  // for tests and benchmarks; "" goes back to the first choice

// Code between PYQLORA_TARGET(isa) and PYQLORA_TARGET_END is compiled for that instruction set, whatever the file's
// flags; it may run only after active_isa() said so. Standard headers must be included before such a region.
#if defined(__x86_64__)
#define PYQLORA_X86 1
#define PYQLORA_AVX2 "avx2,fma,f16c,bmi2"
#define PYQLORA_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"
#define PYQLORA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PYQLORA_TARGET(isa) PYQLORA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PYQLORA_TARGET_END _Pragma("clang attribute pop")
#else
#define PYQLORA_TARGET(isa) _Pragma("GCC push_options") PYQLORA_PRAGMA(GCC target(isa))
#define PYQLORA_TARGET_END _Pragma("GCC pop_options")
#endif
#endif

// The function of this name that fits the active instruction set, among namespaces scalar, avx2 and avx512.
#if PYQLORA_X86
#define PYQLORA_SELECT(...)                                                        \
    (pyqlora::cpu::active_isa() == pyqlora::cpu::Isa::avx512 ? avx512::__VA_ARGS__ \
     : pyqlora::cpu::active_isa() == pyqlora::cpu::Isa::avx2 ? avx2::__VA_ARGS__   \
                                                             : scalar::__VA_ARGS__)
#else
#define PYQLORA_SELECT(...) (scalar::__VA_ARGS__)
#endif

}  // namespace pyqlora::cpu
