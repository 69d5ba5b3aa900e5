// The kernels of linear_4bit over a `Simd`: linear_4bit_cpu.cpp includes this file once for each instruction set.

// One row of x, for rows of W that begin with a block. A register of words holds 8 * width weights in memory order, and
// decodes to eight registers in the order that Lookup finds cheapest; x is laid out to meet them, with zeros at the
// end.
constexpr int64_t kWords = 8 * Simd::width;

inline void spread_row(const float* x, int64_t k, float* out) {
    for (int64_t i = 0; i < k; i += kWords)
        for (int j = 0; j < 8; ++j)
            for (int lane = 0; lane < Simd::width; ++lane) {
                const int64_t from = i + Simd::Lookup<Nf4>::weight(j, lane);
                *out++ = from < k ? x[from] : 0.0f;
            }
}

// `scales`: those of the row's blocks, and zeros up to kWords weights on. A block's products are added before its scale
// is applied.
template <class Q>
float dot_spread(const float* x, int64_t k, const uint8_t* row, const float* scales, int64_t blocksize) {
    const Simd::Lookup<Q> lookup;
    const int log_blocksize = __builtin_ctzll(static_cast<uint64_t>(blocksize));
    const Simd::Ints block = Simd::shift_right(Simd::iota(), log_blocksize - 3);
    Simd::Floats even = Simd::zero(), odd = Simd::zero();
    auto add = [&](Simd::Ints words, int64_t i) {
        Simd::Floats w[8];
        lookup.decode(words, w);
        auto at = [&](int j) { return Simd::load(x + i + j * Simd::width); };
        Simd::Floats a = Simd::mul(w[0], at(0)), b = Simd::mul(w[4], at(4));
        for (int j = 1; j < 4; ++j) {
            a = Simd::fma(w[j], at(j), a);
            b = Simd::fma(w[j + 4], at(j + 4), b);
        }
        const Simd::Floats scale = Simd::spread(scales + (i >> log_blocksize), block);
        even = Simd::fma(a, scale, even);
        odd = Simd::fma(b, scale, odd);
    };
    int64_t i = 0;
    for (; i + kWords <= k; i += kWords) {
        __builtin_prefetch(row + i / 2 + 4096);  // a page ahead: the hardware stops at each page
        add(Simd::load_words(row + i / 2), i);
    }
    if (i < k) add(Simd::load_words(row + i / 2, (k - i) / 8), i);
    return Simd::sum(Simd::add(even, odd));
}

// y[m][row] for M rows of x and one row of W, K % 32 == 0: every chunk of 32 weights is decoded once, in registers.
// `scales` are those of the row's blocks, from the one that its first element is in.
template <class Q, int M>
void dot_decoded(const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize, int64_t row,
                 float* y) {
    // Enough independent sums to hide the latency of the multiply-add, within the registers there are.
    constexpr int sums = M == 1 ? Simd::registers : M <= 4 ? 2 : 1;
    Simd::Floats sum[M][sums];
    for (auto& s : sum)
        for (auto& v : s) v = Simd::zero();
    const uint8_t* bytes = packed + row * k / 2;
    const float *column = x, *last = x + k;
    int64_t left = blocksize - row * k % blocksize;  // of the row's first block, which may have begun in the row before
    for (; column < last; left = blocksize) {
        const auto table = Simd::table<Q, float>(*scales++);
        __builtin_prefetch(bytes + 4096);  // a page ahead: the hardware stops at each page
        const float* stop = std::min(column + left, last);
        for (; column < stop; column += 32, bytes += 16) {
            Simd::Floats w[Simd::registers];
            table.decode(bytes, w);
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
void dot_rows(int m, const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize,
              int64_t row, float* y) {
    if (m == M) return dot_decoded<Q, M>(x, k, packed, scales, blocksize, row, y);
    if constexpr (M > 1) dot_rows<Q, M - 1>(m, x, k, packed, scales, blocksize, row, y);
}

// Up to kMaxRows rows of x.
template <class Q>
void dot_packed(int m, const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize,
                int64_t row, float* y) {
    dot_rows<Q, kMaxRows>(m, x, k, packed, scales, blocksize, row, y);
}
