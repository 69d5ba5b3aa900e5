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

// Rows of x with their registers in turn: rows k apart would meet in the same few sets of the nearest cache.
inline void interleave_rows(const float* x, int rows, int64_t k, float* out) {
    for (int64_t i = 0; i < k; i += Simd::width)
        for (int m = 0; m < rows; ++m, out += Simd::width) Simd::store(out, Simd::load(x + m * k + i));
}

// y[m][j] for M interleaved rows of x and `count` rows of W from `row` on, K % 32 == 0: every chunk of 32 weights is
// decoded once, in registers. The rows of W take turns with columns of x that stay in the nearest cache. `scales` are
// those of the rows' blocks, from the one that the first element is in.
template <class Q, int M>
void dot_decoded(const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize, int64_t row,
                 int count, float* y) {
    // Enough independent sums to hide the latency of the multiply-add, within the registers there are.
    constexpr int sums = M == 1 ? Simd::registers : M <= 4 ? 2 : 1;
    constexpr int64_t columns = M <= 2 ? 1024 : M <= 4 ? 512 : 256;
    alignas(64) Simd::Floats kept[kGroup][M][sums];
    const int64_t first_block = row * k / blocksize;
    for (int64_t column = 0; column < k; column += columns) {
        const int64_t stop_column = std::min(column + columns, k);
        // To this row's next turn; in the last one, to the first turn of the row that follows the group's.
        const int64_t ahead = (column + columns < k ? columns : kGroup * k - column) / 2;
        for (int j = 0; j < count; ++j) {
            Simd::Floats sum[M][sums];
            for (int m = 0; m < M; ++m)
                for (int s = 0; s < sums; ++s) sum[m][s] = column ? kept[j][m][s] : Simd::zero();
            const int64_t element = (row + j) * k + column;
            const float* scale = scales + element / blocksize - first_block;
            const uint8_t* bytes = packed + element / 2;
            const float *at = x + column * M, *last = x + stop_column * M;
            int64_t left = blocksize - element % blocksize;  // of the first block, which may have begun before
            auto table = Simd::table<Q, float>(*scale);
            for (; at < last; at += 32 * M, bytes += 16, left -= 32) {
                if (left == 0) {
                    table = Simd::table<Q, float>(*++scale);
                    left = blocksize;
                }
                __builtin_prefetch(bytes + ahead);
                for (int r = 0; r < Simd::registers; ++r) {
                    const Simd::Floats w = table.decode(bytes, r);
                    for (int m = 0; m < M; ++m) {
                        Simd::Floats& s = sum[m][r % sums];
                        s = Simd::fma(w, Simd::load(at + (r * M + m) * Simd::width), s);
                    }
                }
            }
            for (int m = 0; m < M; ++m)
                for (int s = 0; s < sums; ++s) kept[j][m][s] = sum[m][s];
        }
    }
    for (int j = 0; j < count; ++j)
        for (int m = 0; m < M; ++m) {
            for (int s = 1; s < sums; ++s) kept[j][m][0] = Simd::add(kept[j][m][0], kept[j][m][s]);
            y[m * kGroup + j] = Simd::sum(kept[j][m][0]);
        }
}

template <class Q, int M>
void dot_rows(int m, const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize,
              int64_t row, int count, float* y) {
    if (m == M) return dot_decoded<Q, M>(x, k, packed, scales, blocksize, row, count, y);
    if constexpr (M > 1) dot_rows<Q, M - 1>(m, x, k, packed, scales, blocksize, row, count, y);
}

// Up to kMaxRows rows of x and kGroup rows of W.
template <class Q>
void dot_packed(int m, const float* x, int64_t k, const uint8_t* packed, const float* scales, int64_t blocksize,
                int64_t row, int count, float* y) {
    dot_rows<Q, kMaxRows>(m, x, k, packed, scales, blocksize, row, count, y);
}
