// Panels of a 4-bit weight for gemm.h, over a `Simd`: linear_4bit_gemm_cpu.cpp includes this file once for each
// instruction set. K is a multiple of 32, so that 32 neighbouring weights of a row share a byte boundary and a block.

// 32 steps of the depth of W's rows [row, row + 16): 16 columns of Wᵀ, written `stride` floats apart. `scales` are
// those of the rows. Codes are transposed as bytes, sixteen rows at a time, and decoded in their new order.
template <class Q>
void decode_columns(const uint8_t* const* rows, const float* scales, int64_t stride, float* out) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128((const __m128i*)rows[i]);
    // Four rounds of interleaving register i with register i + 8 transpose the 16 x 16 bytes.
    for (int round = 0; round < 4; ++round) {
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 16; ++i) a[i] = b[i];
    }
    constexpr int parts = 16 / Simd::width;
    const Simd::Codebook<Q> book;
    Simd::Floats scale[parts];
    for (int p = 0; p < parts; ++p) scale[p] = Simd::load(scales + p * Simd::width);
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 16; ++i) {
        __m128i codes[2] = {_mm_and_si128(_mm_srli_epi16(a[i], 4), mask), _mm_and_si128(a[i], mask)};
        for (int half = 0; half < 2; ++half, out += stride)
            for (int p = 0; p < parts; ++p) {
                Simd::store(out + p * Simd::width, Simd::mul(book(Simd::widen(codes[half])), scale[p]));
                if (parts > 1) codes[half] = _mm_srli_si128(codes[half], Simd::width % 16);
            }
    }
}

// Panels of Wᵀ: the depth runs along W's rows.
template <class Q>
void pack_transposed(const Weight& w, const Slab& slab, float* out) {
    constexpr int64_t kScales = 64;  // for each row: of 64 runs of 32 weights
    float scales[kScales][16];
    const uint8_t* rows[16];
    for (int64_t column = 0; column < slab.count; column += 16) {
        float* to = out + column / slab.width * slab.width * slab.depth + column % slab.width;
        for (int64_t d = 0; d < slab.depth; d += 32 * kScales) {
            const int64_t runs = std::min(kScales, (slab.depth - d) / 32);
            for (int64_t i = 0; i < 16; ++i) {
                // Behind the last row the last one stands again: what comes of it is not looked at.
                const int64_t row = slab.first + std::min(column + i, slab.count - 1);
                const int64_t begin = row * w.k + slab.from + d, first = begin >> w.log2_blocksize;
                float blocks[kScales + 1];
                w.scale.range(first, ((begin + 32 * runs - 1) >> w.log2_blocksize) + 1, blocks);
                rows[i] = w.packed + begin / 2;
                for (int64_t r = 0; r < runs; ++r)
                    scales[r][i] = blocks[((begin + 32 * r) >> w.log2_blocksize) - first];
            }
            for (int64_t r = 0; r < runs; ++r, to += 32 * slab.width) {
                decode_columns<Q>(rows, scales[r], slab.width, to);
                for (const uint8_t*& row : rows) row += 16;
            }
        }
    }
}

// Panels of W: one of its rows is one step of the depth.
template <class Q>
void pack_straight(const Weight& w, const Slab& slab, float* out) {
    const int64_t panel = slab.width * slab.depth;
    for (int64_t d = 0; d < slab.depth; ++d, out += slab.width) {
        int64_t at = (slab.from + d) * w.k + slab.first;
        const int64_t end = at + slab.count;
        const uint8_t* bytes = w.packed + at / 2;
        float* to = out;
        int64_t column = 0;  // in the panel
        while (at < end) {
            const int64_t block = at >> w.log2_blocksize;
            const auto table = Simd::table<Q, float>(w.scale(block));
            for (const int64_t stop = std::min((block + 1) << w.log2_blocksize, end); at < stop;
                 at += 32, bytes += 16) {
                Simd::Floats values[Simd::registers];
                table.decode(bytes, values);
                for (int r = 0; r < Simd::registers; ++r) {
                    Simd::store(to + column, values[r]);
                    column += Simd::width;
                    if (column == slab.width) {
                        column = 0;
                        to += panel;
                    }
                }
            }
        }
    }
}
