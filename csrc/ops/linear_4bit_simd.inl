// The kernels of linear_4bit over a `Simd`: linear_4bit_cpu.cpp includes this file once for each instruction set.

// y[m][row] for M rows of x and one row of W, K % 32 == 0: every chunk of 32 weights is decoded once, in registers.
template <class Q, int M>
void dot_decoded(const float* x, int64_t k, const uint8_t* packed, const BlockScale& scale, int64_t blocksize,
                 int64_t row, float* y) {
    // Enough independent sums to hide the latency of the multiply-add, within the registers there are.
    constexpr int sums = M == 1 ? Simd::registers : M <= 4 ? 2 : 1;
    Simd::Floats sum[M][sums];
    for (auto& s : sum)
        for (auto& v : s) v = Simd::zero();
    const int64_t begin = row * k, end = begin + k;
    int64_t i = begin;
    for (int64_t block = begin / blocksize; i < end; ++block) {
        const int64_t stop = std::min((block + 1) * blocksize, end);
        const auto table = Simd::table<Q, float>(scale(block));
        for (; i < stop; i += 32) {
            Simd::Floats w[Simd::registers];
            table.decode(packed + i / 2, w);
            const float* column = x + (i - begin);
            for (int m = 0; m < M; ++m)
                for (int r = 0; r < Simd::registers; ++r) {
                    Simd::Floats& s = sum[m][r % sums];
                    s = Simd::fma(w[r], Simd::load(column + m * k + Simd::width * r), s);
                }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int s = 1; s < sums; ++s) sum[m][0] = Simd::add(sum[m][0], sum[m][s]);
        y[m] = Simd::sum(sum[m][0]);
    }
}

template <class Q, int M>
void dot_rows(int m, const float* x, int64_t k, const uint8_t* packed, const BlockScale& scale, int64_t blocksize,
              int64_t row, float* y) {
    if (m == M) return dot_decoded<Q, M>(x, k, packed, scale, blocksize, row, y);
    if constexpr (M > 1) dot_rows<Q, M - 1>(m, x, k, packed, scale, blocksize, row, y);
}

// Up to kMaxRows rows of x.
template <class Q>
void dot_packed(int m, const float* x, int64_t k, const uint8_t* packed, const BlockScale& scale, int64_t blocksize,
                int64_t row, float* y) {
    dot_rows<Q, kMaxRows>(m, x, k, packed, scale, blocksize, row, y);
}

// The product of two float rows.
inline float dot(const float* x, const float* w, int64_t k) {
    Simd::Floats sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    int64_t i = 0;
    for (; i + 4 * Simd::width <= k; i += 4 * Simd::width)
        for (int r = 0; r < 4; ++r)
            sum[r] = Simd::fma(Simd::load(w + i + Simd::width * r), Simd::load(x + i + Simd::width * r), sum[r]);
    float tail = 0;
    for (; i < k; ++i) tail += x[i] * w[i];
    return Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3]))) + tail;
}
