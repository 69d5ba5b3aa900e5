// What the row loops of several operations share: included in their .inl files, once for each instruction set.

constexpr int64_t kLanes = 16;  // of sums and maxima, whatever the instruction set: the same bits

inline float total(const float* lanes) {
    float sum[kLanes / 2];
    for (int64_t j = 0; j < kLanes / 2; ++j) sum[j] = lanes[j] + lanes[j + kLanes / 2];
    for (int64_t half = kLanes / 4; half; half /= 2)
        for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
    return sum[0];
}

// Σ x·y. The rest has a sum of its own: adding it to a lane's would keep that lane from the vectors.
inline float inner(const float* x, const float* y, int64_t n) {
    float sum[kLanes] = {}, rest = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) sum[j] = fmaf(x[i + j], y[i + j], sum[j]);
    for (; i < n; ++i) rest = fmaf(x[i], y[i], rest);
    return total(sum) + rest;
}

// exp(x) for x up to 0, or not far above, to 2 units in the last place; 0 below -87, NaN for NaN.
// x = n·ln 2 + r, and exp(r) by its series, with the last coefficients moved a little for |r| up to ln 2 / 2.
[[gnu::always_inline]] inline float exponential(float x) {
    constexpr float magic = 0x1.8p23f;  // adding it leaves the rounded integer in the low bits
    const float shifted = fmaf(x, 1.44269504f, magic), n = shifted - magic;
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(1.98756915e-4f, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.33345191e-3f);
    p = fmaf(p, r, 4.16657959e-2f);
    p = fmaf(p, r, 1.66666655e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
    const float power = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
    const uint32_t gone = 0u - (x < -87.0f);  // written on the bits: a branch would keep the loop from vectors
    return bit_cast<float>(bit_cast<uint32_t>(power + x * 0.0f) & ~gone);
}
