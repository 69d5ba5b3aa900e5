// The row loops of attention_cpu.cpp, which the compiler vectorizes: included once for each instruction set, inside its
// namespace and target region.
#include "core/row_math.inl"

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
    const float mean = inner(p, dp, n);
    for (int64_t i = 0; i < n; ++i) dp[i] = p[i] * (dp[i] - mean) * scale;
}
