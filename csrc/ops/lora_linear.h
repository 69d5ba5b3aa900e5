// lora_linear: the products of a low-rank update and of its gradients.
//
//   dropout    y = drop(x)
//   down       s = scale · drop(x)·Aᵀ                    [m, k] -> [m, columns]
//   up         y += drop(s·Bᵀ)                           [m, columns] -> [m, n]
//   backward   ds = scale · dy·B and db = drop(dy)ᵀ·s    from one pass over dy
//
// Factors (A [rank, k], B [n, rank]) are of any float, sums are float32. On a GPU x and dy are 16-bit (but for
// dropout), and s and ds are of their dtype; on the CPU x and dy are of any float, s and ds float32, and there is one
// factor and no workspace. `inner` is the dtype of s and ds.
//
// down and up take several factors. Without `tiles` down stacks them, for projections that share x: s holds a matrix
// [m, rank] for each, one after the other. With `tiles`, i32 [count, 3] of (first row, rows <= 32, factor or -1 for
// none), every row is of one tile and has its own factor, from column 0 on: a batch of several adapters.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/philox.h"
#include "ops/quantize.h"

namespace pyqlora {

struct Dropout {
    TensorRef seed;  // i64 [1], or None for no dropout
    double probability;

    uint32_t threshold() const {
        return seed.defined() ? std::min<long>(std::lround(probability * kDropoutLevels), kDropoutLevels - 1) : 0;
    }
};

struct LoraDropoutArgs {
    TensorRef x;  // f32, f16 or bf16 [m, columns]
    TensorRef y;  // f32 or x's dtype, out; may be x
    Dropout dropout;
    int64_t columns;
};

struct LoraFactors {
    static constexpr int max_count = 64;

    std::vector<TensorRef> factors;  // [rank, length] or [length, rank]
    int64_t length;

    int64_t rank(size_t i) const { return factors[i].numel / length; }
    int64_t widest() const {
        int64_t result = 0;
        for (size_t i = 0; i < factors.size(); ++i) result = std::max(result, rank(i));
        return result;
    }
    int64_t stacked() const {
        int64_t result = 0;
        for (size_t i = 0; i < factors.size(); ++i) result += rank(i);
        return result;
    }
};

struct LoraDownArgs {
    DType inner;
    TensorRef x;  // [m, k]
    LoraFactors a;
    std::vector<float> scales;  // one for each factor
    TensorRef tiles;            // or None
    Dropout dropout;
    TensorRef s;          // [m, columns], or stacked, out
    TensorRef workspace;  // f32 [splits, m * columns], or None for one split

    int64_t m() const { return x.numel / a.length; }
    int64_t columns() const { return tiles.defined() ? a.widest() : a.stacked(); }
    int64_t splits() const { return workspace.defined() ? workspace.numel / s.numel : 1; }
};

struct LoraUpArgs {
    DType inner;
    TensorRef s;  // [m, columns]
    LoraFactors b;
    TensorRef tiles;  // or None
    Dropout dropout;  // of the product
    TensorRef y;      // [m, n]
    bool accumulate;  // else y = …

    int64_t m() const { return y.numel / b.length; }
};

struct LoraBackwardArgs {
    DType inner;
    TensorRef dy;  // [m, n]
    TensorRef b;   // f32, f16 or bf16 [n, rank], or None: no ds
    TensorRef s;   // [m, rank]
    double scale;
    Dropout dropout;  // of dy, only without b
    TensorRef ds;     // [m, rank], out
    TensorRef db;     // f32, f16 or bf16 [n, rank], or [rank, n] if transposed, out
    bool transposed;
    TensorRef ds_parts;  // f32 [ceil(n / columns), m, rank]; on a GPU, like the next
    TensorRef db_parts;  // f32 [chunks of rows, rank, n]
    int64_t n;

    static constexpr int columns = 512;  // of dy, for one thread block
    int64_t m() const { return dy.numel / n; }
    int64_t rank() const { return db.numel / n; }
    int64_t chunks() const { return db_parts.numel / db.numel; }
};

inline void check_dropout(const char* op, const Dropout& d, Device device) {
    if (!d.seed.defined()) return;
    check_tensor(op, "seed", d.seed, device, {DType::i64}, 1);
    if (!(d.probability >= 0.0 && d.probability < 1.0))
        bad_argument(op, "dropout", "a probability in [0, 1)", std::to_string(d.probability));
}

inline void check_factors(const char* op, const char* arg, const LoraFactors& f, Device device) {
    const auto count = static_cast<int64_t>(f.factors.size());
    if (count < 1 || count > f.max_count)
        bad_argument(op, arg, "1 to " + std::to_string(f.max_count) + " factors", std::to_string(count));
    if (f.length < 1) bad_argument(op, arg, "a positive length", std::to_string(f.length));
    for (const TensorRef& t : f.factors) {
        check_tensor(op, arg, t, device, {DType::f32, DType::f16, DType::bf16});
        if (t.numel == 0 || t.numel % f.length)
            bad_argument(op, arg, "a multiple of " + std::to_string(f.length) + " elements", std::to_string(t.numel));
        if (t.dtype != f.factors[0].dtype) bad_argument(op, arg, "factors of one dtype", name(t.dtype));
        check_same_device(op, {{arg, f.factors[0]}, {arg, t}});
    }
}

// Activations [m, columns]; on a GPU of the dtype `inner`.
inline void check_rows(const char* op, const char* arg, const TensorRef& t, Device device, int64_t columns,
                       DType inner) {
    if (inner == DType::f32)
        check_tensor(op, arg, t, device, {DType::f32, DType::f16, DType::bf16});
    else
        check_tensor(op, arg, t, device, {DType::f16, DType::bf16});
    if (t.numel % columns)
        bad_argument(op, arg, "rows of " + std::to_string(columns), std::to_string(t.numel) + " elements");
}

inline void check_tiles(const char* op, const TensorRef& tiles, const LoraFactors& factors, Device device,
                        DType inner) {
    if (inner == DType::f32 && (tiles.defined() || factors.factors.size() > 1))
        bad_argument(op, tiles.defined() ? "tiles" : "factors", tiles.defined() ? "None on a CPU" : "one on a CPU",
                     tiles.defined() ? "a tensor" : std::to_string(factors.factors.size()));
    if (!tiles.defined()) return;
    check_tensor(op, "tiles", tiles, device, {DType::i32});
    if (tiles.numel % 3) bad_argument(op, "tiles", "three numbers a tile", std::to_string(tiles.numel) + " elements");
}

inline void check(const LoraDropoutArgs& a, Device device) {
    const char* op = "lora_dropout";
    check_tensor(op, "x", a.x, device, {DType::f32, DType::f16, DType::bf16});
    check_tensor(op, "y", a.y, device, {DType::f32, a.x.dtype}, a.x.numel);
    if (a.columns < 1 || a.x.numel % a.columns)
        bad_argument(op, "columns", "a divisor of " + std::to_string(a.x.numel), std::to_string(a.columns));
    check_tensor(op, "seed", a.dropout.seed, device, {DType::i64});
    check_dropout(op, a.dropout, device);
    check_same_device(op, {{"x", a.x}, {"y", a.y}, {"seed", a.dropout.seed}});
}

inline void check(const LoraDownArgs& a, Device device) {
    const char* op = "lora_down";
    check_factors(op, "a", a.a, device);
    check_rows(op, "x", a.x, device, a.a.length, a.inner);
    check_tiles(op, a.tiles, a.a, device, a.inner);
    check_dropout(op, a.dropout, device);
    if (a.scales.size() != a.a.factors.size())
        bad_argument(op, "scales", "one for each factor", std::to_string(a.scales.size()));
    check_tensor(op, "s", a.s, device, {a.inner}, a.m() * a.columns());
    if (a.workspace.defined()) {
        check_tensor(op, "workspace", a.workspace, device, {DType::f32});
        if (a.s.numel == 0 || a.workspace.numel == 0 || a.workspace.numel % a.s.numel)
            bad_argument(op, "workspace", "a multiple of " + std::to_string(a.s.numel) + " elements",
                         std::to_string(a.workspace.numel));
    }
    check_same_device(op, {{"x", a.x},
                           {"a", a.a.factors[0]},
                           {"tiles", a.tiles},
                           {"seed", a.dropout.seed},
                           {"s", a.s},
                           {"workspace", a.workspace}});
}

inline void check(const LoraUpArgs& a, Device device) {
    const char* op = "lora_up";
    check_factors(op, "b", a.b, device);
    if (!a.tiles.defined() && a.b.factors.size() > 1)
        bad_argument(op, "b", "one factor where there are no tiles", std::to_string(a.b.factors.size()));
    check_rows(op, "y", a.y, device, a.b.length, a.inner);
    check_tiles(op, a.tiles, a.b, device, a.inner);
    check_dropout(op, a.dropout, device);
    check_tensor(op, "s", a.s, device, {a.inner}, a.m() * a.b.widest());
    check_same_device(op,
                      {{"y", a.y}, {"s", a.s}, {"b", a.b.factors[0]}, {"tiles", a.tiles}, {"seed", a.dropout.seed}});
}

inline void check(const LoraBackwardArgs& a, Device device) {
    const char* op = "lora_backward";
    if (a.n < 1) bad_argument(op, "n", "a positive number", std::to_string(a.n));
    check_rows(op, "dy", a.dy, device, a.n, a.inner);
    check_tensor(op, "db", a.db, device, {DType::f32, DType::f16, DType::bf16});
    if (a.db.numel == 0 || a.db.numel % a.n)
        bad_argument(op, "db", "a multiple of " + std::to_string(a.n) + " elements", std::to_string(a.db.numel));
    check_tensor(op, "s", a.s, device, {a.inner}, a.m() * a.rank());
    check_dropout(op, a.dropout, device);
    const bool in_parts = a.inner != DType::f32;
    if (in_parts) {
        check_tensor(op, "db_parts", a.db_parts, device, {DType::f32});
        if (a.db_parts.numel == 0 || a.db_parts.numel % a.db.numel)
            bad_argument(op, "db_parts", "a multiple of " + std::to_string(a.db.numel) + " elements",
                         std::to_string(a.db_parts.numel));
    }
    if (a.b.defined()) {
        if (a.dropout.seed.defined()) bad_argument(op, "seed", "None where there is b", "a tensor");
        check_tensor(op, "b", a.b, device, {DType::f32, DType::f16, DType::bf16}, a.db.numel);
        check_tensor(op, "ds", a.ds, device, {a.inner}, a.s.numel);
        if (in_parts)
            check_tensor(op, "ds_parts", a.ds_parts, device, {DType::f32}, ceil_div(a.n, a.columns) * a.s.numel);
    }
    check_same_device(op, {{"dy", a.dy},
                           {"b", a.b},
                           {"s", a.s},
                           {"seed", a.dropout.seed},
                           {"ds", a.ds},
                           {"db", a.db},
                           {"ds_parts", a.ds_parts},
                           {"db_parts", a.db_parts}});
}

namespace cpu {
void lora_dropout(const LoraDropoutArgs& a, int threads);
void lora_down(const LoraDownArgs& a, int threads);
void lora_up(const LoraUpArgs& a, int threads);
void lora_backward(const LoraBackwardArgs& a, int threads);
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void lora_dropout(const LoraDropoutArgs& a, void* stream);
void lora_down(const LoraDownArgs& a, void* stream);
void lora_up(const LoraUpArgs& a, void* stream);
void lora_backward(const LoraBackwardArgs& a, void* stream);
// Into how many parts lora_down splits its sum over k, and lora_backward the rows, to give every multiprocessor work.
// The first does not depend on the factors: one gives the same bits alone and stacked with others.
int64_t lora_down_splits(int64_t tiles, int64_t k, int64_t multiprocessors);
int64_t lora_backward_chunks(int64_t m, int64_t n, int64_t multiprocessors);
}  // namespace cuda

}  // namespace pyqlora
