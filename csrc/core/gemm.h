// Float32 matrix products whose operands are made piece by piece where they are needed: decoded from 4 bits, converted
// from 16, dropped. C = A1·B1 + A2·B2 + … is computed in tiles; nothing of the size of a decoded operand is ever held.
//
// A is cut into strips of tile_rows() rows, B into panels of tile_columns() columns. Panels are packed: stored with the
// depth (the index that is summed over) outside, [depth][width], and zeros behind the last column. A strip is read as
// it lies in memory, along or across the depth; only what is not float32 there, and a last strip of fewer rows, is
// copied:
//
//     panel           b(0,0) b(0,1) … b(0,15)  b(1,0) b(1,1) … b(1,15)  …
//     strip, across   a(0,0) a(1,0) … a(5,0)  … a(0,1) a(1,1) … a(5,1)  …
//     strip, along    a(0,0) a(0,1) a(0,2) …    a(1,0) a(1,1) a(1,2)  …
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace pyqlora::cpu {

// out[i] = x · row i of a matrix [count, k] of `dtype` (f32, f16 or bf16), for what is too small to be packed.
using RowProducts = void (*)(const float* x, const void* matrix, int64_t count, int64_t k, float* out);
RowProducts row_products(DType dtype);

int64_t tile_rows();
int64_t tile_columns();

// Columns [first, first + count) of B, over the depth [from, from + depth), in panels `width` wide.
struct Slab {
    int64_t first, count, from, depth, width;

    int64_t packs() const { return ceil_div(count, width); }
    int64_t floats() const { return packs() * width * depth; }
};
using Pack = std::function<void(const Slab&, float* out)>;

// A matrix in memory, line by line: `read` gives elements [first, first + count) of a line, where `first` is a multiple
// of kReadStep. Where it would only copy float32 values, they can be had at
// `plain` + line * stride too.
struct Lines {
    std::function<void(int64_t line, int64_t first, int64_t count, float* out)> read;
    const float* plain = nullptr;
    int64_t stride = 0;
};
constexpr int64_t kReadStep = 64;

Pack pack_along(Lines lines);   // a line is a column of B: the depth runs along it
Pack pack_across(Lines lines);  // a line is one step of the depth

// A: a line is one of its rows, or one step of the depth.
struct Strips {
    Lines lines;
    bool across;
};
inline Strips strips_along(Lines lines) { return {std::move(lines), false}; }
inline Strips strips_across(Lines lines) { return {std::move(lines), true}; }

// The rows of an f32, f16 or bf16 matrix of this many columns, each value times `scale`.
Lines rows_of(const TensorRef& matrix, int64_t columns, float scale = 1.0f);

// What happens to C: elements [first, first + count) of a row, in place or to be stored away.
using OnRow = std::function<void(int64_t row, int64_t first, int64_t count, float* c)>;

// Where that is no more than writing float32 values to `plain` + row * stride, or adding them to what is there, the sum
// may be made there at once.
struct Then {
    OnRow row;
    float* plain = nullptr;
    int64_t stride = 0;
    bool adds = false;

    Then() = default;
    Then(OnRow row) : row(std::move(row)) {}
};

struct Term {
    int64_t depth;
    Strips a;
    Pack b;
    Then then;  // after this term was added, may be empty
};

// C [m, n] = the sum of the terms in their order; the last term's `then` takes the result. `then` is called for every
// element of C once, from several threads. The same bits for any number of threads.
void multiply(int64_t m, int64_t n, const std::vector<Term>& terms, int threads);

// `then` that writes C, plus `bias` [n] if it is not null, or plus what is there, to an f32, f16 or bf16 matrix.
Then store_to(const TensorRef& matrix, int64_t columns, const float* bias = nullptr);
Then add_to(const TensorRef& matrix, int64_t columns);

}  // namespace pyqlora::cpu
