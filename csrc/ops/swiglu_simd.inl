// The loops of swiglu_cpu.cpp, which the compiler vectorizes: included once for each instruction set, inside its
// namespace and target region. The exponentials are a loop of their own, because one chain of all instructions is
// longer than what a processor looks ahead.
#include "core/row_math.inl"

// e = exp(-|x|).
inline void decays(const float* x, int64_t n, float* e) {
    for (int64_t i = 0; i < n; ++i) e[i] = exponential(bit_cast<float>(bit_cast<uint32_t>(x[i]) | 0x80000000u));
}

struct Sigmoid {
    float value, rest;  // s and 1 - s, neither of them a difference
};

// Of x, with e = exp(-|x|).
[[gnu::always_inline]] inline Sigmoid sigmoid(float x, float e) {
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    const uint32_t negative = 0u - (bit_cast<uint32_t>(x) >> 31);  // on the bits, as in exponential()
    const uint32_t swap = (bit_cast<uint32_t>(larger) ^ bit_cast<uint32_t>(smaller)) & negative;
    return {bit_cast<float>(bit_cast<uint32_t>(larger) ^ swap), bit_cast<float>(bit_cast<uint32_t>(smaller) ^ swap)};
}

// y = gate · sigmoid(gate) · up; y comes with exp(-|gate|).
inline void gated(const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * sigmoid(gate[i], y[i]).value * up[i];
}

// dgate comes with exp(-|gate|).
inline void gated_gradients(const float* gate, const float* up, const float* dy, int64_t n, float* dgate, float* dup) {
    for (int64_t i = 0; i < n; ++i) {
        const Sigmoid s = sigmoid(gate[i], dgate[i]);
        const float activation = gate[i] * s.value;
        dgate[i] = dy[i] * up[i] * fmaf(activation, s.rest, s.value);
        dup[i] = dy[i] * activation;
    }
}
