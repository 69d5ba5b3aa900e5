// The kernel of linear_dense over a `Simd`: linear_dense_cpu.cpp includes this file once for each instruction set.

// y[m][line] = x[m] · line, for M rows of x and kLines lines of W.
template <class T, int M>
void dot_lines(const float* x, int64_t k, const T* const* lines, float* y) {
    Simd::Floats sum[kLines][M];
    for (auto& of_line : sum)
        for (auto& s : of_line) s = Simd::zero();
    int64_t i = 0;
    for (; i + Simd::width <= k; i += Simd::width)
        for (int line = 0; line < kLines; ++line) {
            const Simd::Floats w = Simd::load(lines[line] + i);
            for (int m = 0; m < M; ++m) sum[line][m] = Simd::fma(w, Simd::load(x + m * k + i), sum[line][m]);
        }
    for (int m = 0; m < M; ++m)
        for (int line = 0; line < kLines; ++line) {
            float rest = 0;
            for (int64_t j = i; j < k; ++j) rest += x[m * k + j] * to_float(lines[line][j]);
            y[m * kLines + line] = Simd::sum(sum[line][m]) + rest;
        }
}
