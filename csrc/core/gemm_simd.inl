// The inner loops of gemm.cpp over a `Simd`: included once for each instruction set, inside its namespace and target
// region.

constexpr int64_t kRows = Simd::tile_rows, kColumns = 2 * Simd::width;

// c [kRows, kColumns] = (or +=) strip · panel. The strip's lines, `line` apart, are its rows or, across, the depth's
// steps. The rows of the next strip are fetched ahead, except where they would share a few sets of the first cache.
template <bool across>
inline void tile(int64_t depth, const float* a, int64_t line, const float* b, float* c, int64_t stride, bool add) {
    Simd::Floats sum[kRows][2];
    const float* at[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        sum[r][0] = sum[r][1] = Simd::zero();
        at[r] = across ? a + r : a + r * line;
    }
    const int64_t next = line % kAlias ? kRows * line : 0;
    for (int64_t d = 0; d < depth; ++d, b += kColumns) {
        if (!across && d % kCacheLine == 0) {
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) __builtin_prefetch(at[r] + next + d);
        }
        const Simd::Floats left = Simd::load(b), right = Simd::load(b + Simd::width);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Simd::Floats x = Simd::set(at[r][across ? d * line : d]);
            sum[r][0] = Simd::fma(x, left, sum[r][0]);
            sum[r][1] = Simd::fma(x, right, sum[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, c += stride) {
        if (add) {
            sum[r][0] = Simd::add(sum[r][0], Simd::load(c));
            sum[r][1] = Simd::add(sum[r][1], Simd::load(c + Simd::width));
        }
        Simd::store(c, sum[r][0]);
        Simd::store(c + Simd::width, sum[r][1]);
    }
}

// Eight vectors of eight: out[i] lane j = in[j] lane i.
inline void transpose8(const float* in, int64_t stride, __m256* out) {
    __m256 r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

// `width` lines, `stride` apart, of `depth` values each, to [depth][width]. width is a multiple of 8, and lines can be
// read up to a multiple of 8.
inline void interleave(const float* lines, int64_t stride, int64_t width, int64_t depth, float* out) {
    for (int64_t d = 0; d < depth; d += 8) {
        const int64_t steps = std::min<int64_t>(8, depth - d);
        for (int64_t line = 0; line < width; line += 8) {
            __m256 columns[8];
            transpose8(lines + line * stride + d, stride, columns);
            for (int64_t i = 0; i < steps; ++i) _mm256_storeu_ps(out + (d + i) * width + line, columns[i]);
        }
    }
}

// A panel's columns of `depth` lines, `stride` apart, to [depth][kColumns].
inline void gather(const float* lines, int64_t stride, int64_t depth, float* out) {
    for (int64_t d = 0; d < depth; ++d, lines += stride, out += kColumns) {
        Simd::store(out, Simd::load(lines));
        Simd::store(out + Simd::width, Simd::load(lines + Simd::width));
    }
}

template <class T>
void to_floats(const T* x, int64_t count, float scale, float* out) {
    const Simd::Floats s = Simd::set(scale);
    int64_t i = 0;
    for (; i + Simd::width <= count; i += Simd::width) Simd::store(out + i, Simd::mul(Simd::load(x + i), s));
    for (; i < count; ++i) out[i] = to_float(x[i]) * scale;
}

// y = c + other, rounded to T; `other` may be null.
template <class T, class Other>
void add_rounded(const float* c, const Other* other, int64_t count, T* y) {
    int64_t i = 0;
    for (; i + Simd::width <= count; i += Simd::width) {
        const Simd::Floats x = Simd::load(c + i);
        Simd::store(y + i, other ? Simd::add(x, Simd::load(other + i)) : x);
    }
    for (; i < count; ++i) y[i] = from_float<T>(other ? c[i] + to_float(other[i]) : c[i]);
}

template <class T>
float dot(const float* x, const T* w, int64_t k) {
    Simd::Floats sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    int64_t i = 0;
    for (; i + 4 * Simd::width <= k; i += 4 * Simd::width)
        for (int r = 0; r < 4; ++r)
            sum[r] = Simd::fma(Simd::load(w + i + Simd::width * r), Simd::load(x + i + Simd::width * r), sum[r]);
    for (; i + Simd::width <= k; i += Simd::width) sum[0] = Simd::fma(Simd::load(w + i), Simd::load(x + i), sum[0]);
    float tail = 0;
    for (; i < k; ++i) tail += x[i] * to_float(w[i]);
    return Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3]))) + tail;
}

template <class T>
void products(const float* x, const void* matrix, int64_t count, int64_t k, float* out) {
    const T* w = static_cast<const T*>(matrix);
    for (int64_t i = 0; i < count; ++i) out[i] = dot(x, w + i * k, k);
}
