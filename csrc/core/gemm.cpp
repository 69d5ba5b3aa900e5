#include "core/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "core/simd_avx2.h"
#include "core/simd_avx512.h"

namespace pyqlora::cpu {
namespace {

constexpr int64_t kCacheLine = 16;  // floats
constexpr int64_t kAlias = 1024;    // rows so many floats apart share a few sets of the caches

}  // namespace

namespace scalar {
namespace {

constexpr int64_t kRows = 4, kColumns = 8;

template <bool across>
void tile(int64_t depth, const float* a, int64_t line, const float* b, float* c, int64_t stride, bool add) {
    float sum[kRows][kColumns] = {};
    for (int64_t d = 0; d < depth; ++d, b += kColumns)
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) sum[r][i] += a[across ? d * line + r : r * line + d] * b[i];
    for (int r = 0; r < kRows; ++r, c += stride)
        for (int i = 0; i < kColumns; ++i) c[i] = add ? c[i] + sum[r][i] : sum[r][i];
}

void interleave(const float* lines, int64_t stride, int64_t width, int64_t depth, float* out) {
    for (int64_t d = 0; d < depth; ++d)
        for (int64_t line = 0; line < width; ++line) *out++ = lines[line * stride + d];
}

void gather(const float* lines, int64_t stride, int64_t depth, float* out) {
    for (int64_t d = 0; d < depth; ++d, lines += stride, out += kColumns) std::copy_n(lines, kColumns, out);
}

template <class T>
float dot(const float* x, const T* w, int64_t k) {
    float sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] += x[i + j] * to_float(w[i + j]);
    for (; i < k; ++i) sum[0] += x[i] * to_float(w[i]);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class T>
void products(const float* x, const void* matrix, int64_t count, int64_t k, float* out) {
    const T* w = static_cast<const T*>(matrix);
    for (int64_t i = 0; i < count; ++i) out[i] = dot(x, w + i * k, k);
}

template <class T>
void to_floats(const T* x, int64_t count, float scale, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]) * scale;
}

template <class T, class Other>
void add_rounded(const float* c, const Other* other, int64_t count, T* y) {
    for (int64_t i = 0; i < count; ++i) y[i] = from_float<T>(other ? c[i] + to_float(other[i]) : c[i]);
}

}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "core/gemm_simd.inl"
#include "core/each_isa.inl"

namespace {

constexpr int64_t kDepth = 256;           // of a panel, which then stays in the first cache
constexpr int64_t kBlock = 128;           // columns of C whose panels a thread holds in its second cache
constexpr int64_t kStripBytes = 1 << 18;  // of a group of strips that run past one panel after the other
constexpr int64_t kChunkBytes = 3 << 19;  // of the strips of a chunk of rows, which the larger caches hold
constexpr int64_t kFewestRows = 384;      // of a chunk, for each of which all of B is made anew

// Memory that a thread keeps from one product to the next.
class Workspace {
  public:
    float* floats(int64_t count) {
        if (count > size_) {
            memory_.reset();
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, ceil_div(count * 4, 64) * 64)));
            size_ = memory_ ? count : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float[], Free> memory_;
    int64_t size_ = 0;
};

int64_t round_up(int64_t x, int64_t step) { return ceil_div(x, step) * step; }

// A term's strips of rows [first, first + count) in memory.
class Placed {
  public:
    // What is not read in place is written to `out`, which has room for floats_for().
    Placed(const Term& term, int64_t first, int64_t count, float* out, int threads)
        : across(term.a.across), width_(tile_rows()), in_place_(in_place(term, count)) {
        const Lines& lines = term.a.lines;
        const int64_t begin = first + in_place_ * width_, end = first + count;  // of the rows that are copied
        if (begin < end)
            across ? copy_across(term, begin, end, out, threads) : copy_along(term, begin, end, out, threads);
        if (in_place_) at_ = lines.plain + first * (across ? 1 : lines.stride);
        line_ = lines.stride;
    }

    static int64_t floats_for(const Term& term, int64_t count) {
        const int64_t rows = round_up(count, tile_rows()) - in_place(term, count) * tile_rows();
        return rows ? (term.a.across ? rows + kReadStep : rows) * term.depth : 0;
    }

    // A strip from this step of the depth on, and how far apart its lines are.
    const float* strip(int64_t s, int64_t depth) const {
        const bool own = s >= in_place_;
        const int64_t row = (own ? s - in_place_ : s) * width_, line = own ? copied_line_ : line_;
        return (own ? copied_ : at_) + row * (across ? 1 : line) + depth * (across ? line : 1);
    }
    int64_t line(int64_t s) const { return s < in_place_ ? line_ : copied_line_; }

    const bool across;

  private:
    // How many strips are read in place: those with all rows, if any.
    static int64_t in_place(const Term& term, int64_t count) { return term.a.lines.plain ? count / tile_rows() : 0; }

    void copy_along(const Term& term, int64_t begin, int64_t end, float* out, int threads) {
        const int64_t depth = term.depth, rows = round_up(end - begin, width_);
        parallel_for(threads, rows, std::max<int64_t>(1, (1 << 14) / (depth + 1)), [&](int64_t i, int64_t stop) {
            for (; i < stop; ++i)
                if (begin + i < end)
                    term.a.lines.read(begin + i, 0, depth, out + i * depth);
                else
                    std::fill_n(out + i * depth, depth, 0.0f);
        });
        copied_ = out;
        copied_line_ = depth;
    }

    void copy_across(const Term& term, int64_t begin, int64_t end, float* out, int threads) {
        const int64_t before = begin % kReadStep, count = before + end - begin;
        const int64_t line = before + round_up(end - begin, width_);
        parallel_for(threads, term.depth, std::max<int64_t>(1, (1 << 14) / line), [&](int64_t d, int64_t stop) {
            for (; d < stop; ++d) {
                term.a.lines.read(d, begin - before, count, out + d * line);
                std::fill_n(out + d * line + count, line - count, 0.0f);
            }
        });
        copied_ = out + before;
        copied_line_ = line;
    }

    int64_t width_, in_place_;
    const float *at_ = nullptr, *copied_ = nullptr;
    int64_t line_, copied_line_ = 0;
};

// Rows [first, first + count) of C.
void multiply_rows(int64_t first, int64_t count, int64_t n, const std::vector<Term>& terms, int threads) {
    const auto tile_across = PYQLORA_SELECT(tile<true>), tile_along = PYQLORA_SELECT(tile<false>);
    const int64_t width = tile_rows(), columns = tile_columns(), strips = ceil_div(count, width);
    int64_t floats = 0, deepest = 0;
    for (const Term& t : terms) {
        floats += Placed::floats_for(t, count);
        deepest = std::max(deepest, std::min(t.depth, kDepth));
    }
    static thread_local Workspace shared;
    float* out = shared.floats(floats);
    std::vector<Placed> placed;
    bool changed = false;  // on the way
    for (const Term& t : terms) {
        placed.emplace_back(t, first, count, out, threads);
        out += Placed::floats_for(t, count);
        changed |= t.then.row && &t != &terms.back();
    }
    const Then& last = terms.back().then;
    const bool direct = last.plain && last.stride % kAlias && !(last.adds && changed);
    // Work is shared out by blocks of columns and, where those are too few, by parts of the rows.
    const int64_t blocks = ceil_div(n, kBlock);
    const int64_t parts = threads > 1 ? std::clamp<int64_t>(2 * threads / blocks, 1, ceil_div(strips, 8)) : 1;
    const int64_t part_strips = ceil_div(strips, parts);
    parallel_for(threads, blocks * parts, 1, [&](int64_t job, int64_t end) {
        static thread_local Workspace own;
        const int64_t wide = round_up(std::min(kBlock, n), columns);
        float* const panels = own.floats((deepest + part_strips * width) * wide);
        float* const c = panels + deepest * wide;
        for (; job < end; ++job) {
            const int64_t left = job % blocks * kBlock, here = std::min(kBlock, n - left);
            const int64_t begin = job / blocks * part_strips, stop = std::min(begin + part_strips, strips);
            const int64_t rows = std::min(stop * width, count);  // their end
            // Strips from `begin` to here are summed up where they are to stay.
            const int64_t to_stay = direct && here % columns == 0 ? std::min(stop, count / width) : begin;
            auto sums = [&](int64_t row) {
                return row < to_stay * width ? last.plain + (first + row) * last.stride + left
                                             : c + (row - begin * width) * wide;
            };
            bool add = false;
            for (size_t t = 0; t < terms.size(); ++t) {
                const Term& term = terms[t];
                const Placed& a = placed[t];
                const int64_t slices = std::max<int64_t>(1, ceil_div(term.depth, kDepth));
                const int64_t step = round_up(ceil_div(term.depth, slices), kReadStep);
                int64_t from = 0;
                do {  // once also for a depth of 0, whose product is 0
                    const int64_t depth = std::min(step, term.depth - from);
                    const int64_t group = std::max<int64_t>(1, kStripBytes / (4 * width * (depth + 1)));
                    term.b({left, here, from, depth, columns}, panels);
                    for (int64_t s = begin; s < stop; s += group)
                        for (int64_t j = 0; j < here; j += columns)
                            for (int64_t i = s; i < std::min(s + group, stop); ++i)
                                (a.across ? tile_across : tile_along)(
                                    depth, a.strip(i, from), a.line(i), panels + j * depth, sums(i * width) + j,
                                    i < to_stay ? last.stride : wide, add || (i < to_stay && last.adds));
                    from += step;
                    add = true;
                } while (from < term.depth);
                if (!term.then.row) continue;
                for (int64_t i = width * (&term == &terms.back() ? to_stay : begin); i < rows; ++i)
                    term.then.row(first + i, left, here, sums(i));
            }
        }
    });
}

}  // namespace

RowProducts row_products(DType dtype) {
    RowProducts result = nullptr;
    dispatch_float<Half, BFloat16>(dtype,
                                   [&](auto tag) { result = PYQLORA_SELECT(products<typename decltype(tag)::type>); });
    return result;
}

int64_t tile_rows() { return PYQLORA_SELECT(kRows); }
int64_t tile_columns() { return PYQLORA_SELECT(kColumns); }

Pack pack_along(Lines lines) {
    return [lines = std::move(lines), interleave = PYQLORA_SELECT(interleave)](const Slab& slab, float* out) {
        constexpr int64_t kWidest = 32;
        alignas(64) float staged[kWidest * kReadStep];
        for (int64_t line = 0; line < slab.count; line += slab.width, out += slab.width * slab.depth) {
            const int64_t here = std::min(slab.width, slab.count - line);
            int64_t d = 0;
            if (lines.plain && here == slab.width) {
                d = slab.depth / 8 * 8;
                const float* first = lines.plain + (slab.first + line) * lines.stride + slab.from;
                interleave(first, lines.stride, slab.width, d, out);
            }
            // Lines that are not there are zero.
            if (d < slab.depth) std::fill_n(staged + here * kReadStep, (slab.width - here) * kReadStep, 0.0f);
            for (; d < slab.depth; d += kReadStep) {
                const int64_t steps = std::min(kReadStep, slab.depth - d);
                for (int64_t i = 0; i < here; ++i)
                    lines.read(slab.first + line + i, slab.from + d, steps, staged + i * kReadStep);
                interleave(staged, kReadStep, slab.width, steps, out + d * slab.width);
            }
        }
    };
}

Pack pack_across(Lines lines) {
    return [lines = std::move(lines), gather = PYQLORA_SELECT(gather)](const Slab& slab, float* out) {
        constexpr int64_t kStep = 4 * kReadStep;
        alignas(64) float staged[kStep + 32] = {};
        int64_t column = 0;
        if (lines.plain)
            for (; column + slab.width <= slab.count; column += slab.width)
                gather(lines.plain + slab.from * lines.stride + slab.first + column, lines.stride, slab.depth,
                       out + column * slab.depth);
        for (int64_t here; column < slab.count; column += here) {
            here = std::min(kStep, slab.count - column);
            std::fill_n(staged + here, 32, 0.0f);
            for (int64_t d = 0; d < slab.depth; ++d) {
                lines.read(slab.from + d, slab.first + column, here, staged);
                for (int64_t j = 0; j < here; j += slab.width)
                    std::copy_n(staged + j, slab.width, out + (column + j) * slab.depth + d * slab.width);
            }
        }
    };
}

Lines rows_of(const TensorRef& matrix, int64_t columns, float scale) {
    Lines lines;
    dispatch_float<Half, BFloat16>(matrix.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto convert = PYQLORA_SELECT(to_floats<T>);
        lines.read = [=, x = matrix.as<T>()](int64_t line, int64_t first, int64_t count, float* out) {
            convert(x + line * columns + first, count, scale, out);
        };
    });
    if (matrix.dtype == DType::f32 && scale == 1.0f) {
        lines.plain = matrix.as<float>();
        lines.stride = columns;
    }
    return lines;
}

void multiply(int64_t m, int64_t n, const std::vector<Term>& terms, int threads) {
    int64_t depths = 0;
    for (const Term& t : terms) depths += t.depth;
    const int64_t rows = std::max(kFewestRows, kChunkBytes / (4 * std::max<int64_t>(depths, 1)));
    // Chunks of equal size: a small last one would decode all of B for little.
    const int64_t chunk = m ? round_up(ceil_div(m, ceil_div(m, rows)), tile_rows()) : 1;
    for (int64_t first = 0; first < m; first += chunk)
        multiply_rows(first, std::min(chunk, m - first), n, terms, threads);
}

Then store_to(const TensorRef& matrix, int64_t columns, const float* bias) {
    Then store;
    dispatch_float<Half, BFloat16>(matrix.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto add = PYQLORA_SELECT(add_rounded<T, float>);
        store.row = [=, y = matrix.as<T>()](int64_t row, int64_t first, int64_t count, float* c) {
            add(c, bias ? bias + first : nullptr, count, y + row * columns + first);
        };
    });
    if (matrix.dtype == DType::f32 && !bias) {
        store.plain = matrix.as<float>();
        store.stride = columns;
    }
    return store;
}

Then add_to(const TensorRef& matrix, int64_t columns) {
    Then store = store_to(matrix, columns);
    store.adds = true;
    dispatch_float<Half, BFloat16>(matrix.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto add = PYQLORA_SELECT(add_rounded<T, T>);
        store.row = [=, y = matrix.as<T>()](int64_t row, int64_t first, int64_t count, float* c) {
            add(c, y + row * columns + first, count, y + row * columns + first);
        };
    });
    return store;
}

}  // namespace pyqlora::cpu
