// The row loops of rms_norm_cpu.cpp, which the compiler vectorizes: included once for each instruction set, inside its
// namespace and target region.
#include "core/row_math.inl"

// y = x · factor.
inline void scale_row(const float* x, int64_t n, float factor, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

// y = y · x.
inline void multiply_row(const float* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] *= x[i];
}

// dx for a row x; g is memory for a row.
inline void normalized_gradient(const float* x, int64_t n, float rstd, const float* weight, const float* dy, float* g,
                                float* dx) {
    for (int64_t i = 0; i < n; ++i) g[i] = dy[i] * weight[i];
    const float mean = inner(x, g, n) * rstd / static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (g[i] - x[i] * rstd * mean);
}
