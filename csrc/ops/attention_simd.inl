// The row loops of attention_cpu.cpp, which the compiler vectorizes: included once for each instruction set, inside its
// namespace and target region.

constexpr int64_t kLanes = 16;  // of sums and maxima, whatever the instruction set: the same bits

// s = c · scale, plus a mask, or -inf where a key is not seen.
inline void mask_scores(const float* c, int64_t n, float scale, const uint8_t* seen, const float* added, float* s) {
    if (seen)
        for (int64_t i = 0; i < n; ++i) s[i] = seen[i] ? c[i] * scale : -HUGE_VALF;
    else if (added)
        for (int64_t i = 0; i < n; ++i) s[i] = c[i] * scale + added[i];
    else
        for (int64_t i = 0; i < n; ++i) s[i] = c[i] * scale;
}

inline float largest(const float* s, int64_t n) {
    float most[kLanes];
    for (float& x : most) x = -HUGE_VALF;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) most[j] = s[i + j] > most[j] ? s[i + j] : most[j];
    for (; i < n; ++i) most[0] = std::max(most[0], s[i]);
    return *std::max_element(most, most + kLanes);
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

inline float total(const float* lanes) {
    float sum[kLanes / 2];
    for (int64_t j = 0; j < kLanes / 2; ++j) sum[j] = lanes[j] + lanes[j + kLanes / 2];
    for (int64_t half = kLanes / 4; half; half /= 2)
        for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
    return sum[0];
}

// s = exp(s - shift); returns the sum.
inline float exponentials(float* s, int64_t n, float shift) {
    for (int64_t i = 0; i < n; ++i) s[i] = exponential(s[i] - shift);
    float sum[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) sum[j] += s[i + j];
    for (; i < n; ++i) sum[0] += s[i];
    return total(sum);
}

// dp = p · (dp - Σ p·dp) · scale, the gradient of the unscaled scores.
inline void scores_gradient(const float* p, int64_t n, float scale, float* dp) {
    float sum[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) sum[j] = fmaf(p[i + j], dp[i + j], sum[j]);
    for (; i < n; ++i) sum[0] = fmaf(p[i], dp[i], sum[0]);
    const float mean = total(sum);
    for (i = 0; i < n; ++i) dp[i] = p[i] * (dp[i] - mean) * scale;
}
