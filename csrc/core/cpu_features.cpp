#include "core/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyqlora::cpu {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

bool machine_has(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (isa) {
        case Isa::scalar:
            return true;
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("bmi2");
        case Isa::avx512:
            return machine_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#endif
    return isa == Isa::scalar;
}

Isa parse(const std::string& text) {
    std::string known;
    for (Isa isa : supported_isas()) {
        if (text == name(isa)) return isa;
        known += (known.empty() ? "" : ", ") + std::string(name(isa));
    }
    throw std::invalid_argument("PYQLORA_CPU: expected one of " + known + " on this machine, got '" + text + "'");
}

Isa first_choice() {
    const char* forced = std::getenv("PYQLORA_CPU");
    return forced && *forced ? parse(forced) : supported_isas().back();
}

}  // namespace

const char* name(Isa isa) {
    static constexpr const char* names[] = {"scalar", "avx2", "avx512"};
    return names[static_cast<int>(isa)];
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> isas;
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
        if (machine_has(isa)) isas.push_back(isa);
    }
    return isas;
}

Isa active_isa() {
    int isa = chosen.load(std::memory_order_relaxed);
    if (isa == kUnset) {
        isa = static_cast<int>(first_choice());
        chosen.store(isa, std::memory_order_relaxed);
    }
    return static_cast<Isa>(isa);
}

void set_isa(const std::string& text) { chosen.store(static_cast<int>(text.empty() ? first_choice() : parse(text))); }

}  // namespace pyqlora::cpu
