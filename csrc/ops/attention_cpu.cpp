// Blocks of queries, each against the keys that it sees: a block's scores are whole in memory, so a row's softmax needs
// no second pass, and what a causal mask hides is neither computed nor read.
#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "core/float16.h"
#include "core/gemm.h"
#include "core/parallel.h"

namespace pyqlora::cpu {

namespace scalar {
namespace {
#include "ops/attention_simd.inl"
}  // namespace
}  // namespace scalar

#define PYQLORA_SIMD_SOURCE "ops/attention_simd.inl"
#include "core/each_isa.inl"

namespace {

constexpr int64_t kRows = 144;  // of a block: its queries, in every head that shares the keys
constexpr int64_t kPieces = 8;  // that a backward pass is cut into where there are fewer heads: whatever the threads

// A [batch, length, heads, dim] tensor from one row on, in `group` neighbouring heads: lines (row, head), the head
// first.
class HeadRows {
  public:
    HeadRows(const TensorRef& tensor, int64_t length, int64_t heads, int64_t dim, int64_t group, int64_t batch,
             int64_t head, int64_t first)
        : group_(group), dim_(dim), stride_(heads * dim) {
        rows_ = tensor;
        const int64_t offset = (batch * length + first) * stride_ + head * dim;
        rows_.data = tensor.as<char>() + offset * itemsize(tensor.dtype);
    }

    Lines lines() const {
        if (group_ == 1) return rows_of(rows_, stride_);
        Lines lines;
        lines.read = [*this, each = rows_of(rows_, dim_)](int64_t line, int64_t from, int64_t count, float* out) {
            each.read(0, offset(line) + from, count, out);
        };
        return lines;
    }
    OnRow store() const {
        return [*this, each = store_to(rows_, dim_).row](int64_t line, int64_t from, int64_t count, float* c) {
            each(0, offset(line) + from, count, c);
        };
    }

  private:
    int64_t offset(int64_t line) const { return line / group_ * stride_ + line % group_ * dim_; }

    TensorRef rows_;
    int64_t group_, dim_, stride_;
};

int64_t group_of(const AttentionSizes& s) { return s.heads / s.kv_heads; }
int64_t queries_of_block(const AttentionSizes& s) { return std::max<int64_t>(1, kRows / group_of(s)); }

// A block of queries in the heads that share keys and values, and the scores of the keys that they see. Its lines are
// (query, head).
class Block {
  public:
    Block(const AttentionInputs& in, int64_t batch, int64_t kv_head, int64_t first)
        : in_(in), s(in.sizes), batch_(batch), kv_head_(kv_head), group_(group_of(s)), first_(first) {
        const int64_t queries = std::min(queries_of_block(s), s.queries - first);
        lines = queries * group_;
        keys = in.causal ? std::min(s.keys, first + queries) : s.keys;
        while (keys && in.mask.defined() && !seen_by_any(keys - 1)) --keys;
    }

    HeadRows of_queries(const TensorRef& t, int64_t dim) const {
        return {t, s.queries, s.heads, dim, group_, batch_, kv_head_ * group_, first_};
    }
    Lines k() const { return HeadRows(in_.k, s.keys, s.kv_heads, s.dim, 1, batch_, kv_head_, 0).lines(); }
    Lines v() const { return HeadRows(in_.v, s.keys, s.kv_heads, s.value_dim, 1, batch_, kv_head_, 0).lines(); }
    Lines of_scores(float* scores) const { return rows_of({scores, lines * keys, DType::f32, Device::cpu}, keys); }
    float* lse(const TensorRef& t, int64_t line) const {  // [batch, heads, queries]
        return t.as<float>() + (batch_ * s.heads + head(line)) * s.queries + query(line);
    }

    // Keys that a line may see.
    int64_t seen(int64_t line) const { return in_.causal ? std::min(keys, query(line) + 1) : keys; }

    // scores [lines, keys] = scale · q·kᵀ, masked.
    void score(float* scores) const {
        const auto masked = PYQLORA_SELECT(mask_scores);
        const float scale = static_cast<float>(in_.scale);
        const bool bytes = in_.mask.dtype == DType::u8, floats = in_.mask.dtype == DType::f32;
        const OnRow then = [=](int64_t line, int64_t from, int64_t count, float* c) {
            const int64_t at = of_mask(line) + from;
            masked(c, count, scale, bytes ? in_.mask.as<uint8_t>() + at : nullptr,
                   floats ? in_.mask.as<float>() + at : nullptr, scores + line * keys + from);
        };
        multiply(lines, keys, {{s.dim, strips_along(of_queries(in_.q, s.dim).lines()), pack_along(k()), then}}, 1);
    }

  private:
    const AttentionInputs& in_;

  public:
    const AttentionSizes& s;
    int64_t lines, keys;  // keys: how many, from the first one on

  private:
    int64_t query(int64_t line) const { return first_ + line / group_; }
    int64_t head(int64_t line) const { return kv_head_ * group_ + line % group_; }
    int64_t of_mask(int64_t line) const {
        const int64_t batch = s.mask_batch > 1 ? batch_ : 0, h = s.mask_heads > 1 ? head(line) : 0;
        return ((batch * s.mask_heads + h) * s.queries + query(line)) * s.keys;
    }
    bool seen_by_any(int64_t key) const {
        for (int64_t line = 0; line < lines; ++line) {
            const int64_t at = of_mask(line) + key;
            if (in_.mask.dtype == DType::u8 ? in_.mask.as<uint8_t>()[at] != 0 : in_.mask.as<float>()[at] != -HUGE_VALF)
                return true;
        }
        return false;
    }

    int64_t batch_, kv_head_, group_, first_;
};

float* scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
    return memory.data();
}

void forward(const AttentionArgs& a, const Block& block) {
    const auto& s = block.s;
    const int64_t lines = block.lines, keys = block.keys;
    const auto largest = PYQLORA_SELECT(largest);
    const auto exponentials = PYQLORA_SELECT(exponentials);
    float* const scores = scratch(lines * (keys + 1));
    float* const inverse = scores + lines * keys;
    block.score(scores);
    for (int64_t i = 0; i < lines; ++i) {
        float* const line = scores + i * keys;
        const int64_t seen = block.seen(i);
        const float most = largest(line, seen);
        const float sum = exponentials(line, seen, most == -HUGE_VALF ? 0.0f : most);  // 0 where no key is seen
        std::fill(line + seen, line + keys, 0.0f);
        inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
        *block.lse(a.lse, i) = most + std::log(sum);
    }
    const OnRow then = [&, store = block.of_queries(a.out, s.value_dim).store()](int64_t line, int64_t from,
                                                                                 int64_t count, float* c) {
        for (int64_t i = 0; i < count; ++i) c[i] *= inverse[line];
        store(line, from, count, c);
    };
    multiply(lines, s.value_dim, {{keys, strips_along(block.of_scores(scores)), pack_across(block.v()), then}}, 1);
}

// dq of the block; and what it adds to dk [keys, dim] and dv [keys, value_dim].
void backward(const AttentionBackwardArgs& a, const Block& block, float* dk, float* dv) {
    const auto& s = block.s;
    const int64_t lines = block.lines, keys = block.keys;
    const auto exponentials = PYQLORA_SELECT(exponentials);
    const auto gradient = PYQLORA_SELECT(scores_gradient);
    float* const p = scratch(2 * lines * keys);
    float* const dp = p + lines * keys;
    block.score(p);
    const HeadRows dout = block.of_queries(a.dout, s.value_dim), q = block.of_queries(a.in.q, s.dim);
    const Then copy = store_to({dp, lines * keys, DType::f32, Device::cpu}, keys);
    multiply(lines, keys, {{s.value_dim, strips_along(dout.lines()), pack_along(block.v()), copy}}, 1);
    for (int64_t i = 0; i < lines; ++i) {
        const float lse = *block.lse(a.lse, i);
        const int64_t seen = lse == -HUGE_VALF ? 0 : block.seen(i);
        exponentials(p + i * keys, seen, lse);
        gradient(p + i * keys, seen, static_cast<float>(a.in.scale), dp + i * keys);
        for (float* const scores : {p, dp}) std::fill(scores + i * keys + seen, scores + (i + 1) * keys, 0.0f);
    }
    const OnRow store = block.of_queries(a.dq, s.dim).store();
    multiply(lines, s.dim, {{keys, strips_along(block.of_scores(dp)), pack_across(block.k()), store}}, 1);
    const auto add = [&](float* sums, int64_t dim, float* left, const HeadRows& right) {
        const Then then = add_to({sums, s.keys * dim, DType::f32, Device::cpu}, dim);
        multiply(keys, dim, {{lines, strips_across(block.of_scores(left)), pack_across(right.lines()), then}}, 1);
    };
    add(dk, s.dim, dp, q);
    add(dv, s.value_dim, p, dout);
}

// One head of `to` [batch, keys, kv_heads, dim] from the sums [keys, dim] of its pieces.
void add_pieces(float* sums, int64_t pieces, const AttentionSizes& s, int64_t dim, const TensorRef& to, int64_t batch,
                int64_t head) {
    const int64_t size = s.keys * dim;
    for (int64_t piece = 1; piece < pieces; ++piece)
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[piece * size + i];
    const OnRow store = HeadRows(to, s.keys, s.kv_heads, dim, 1, batch, head, 0).store();
    for (int64_t key = 0; key < s.keys; ++key) store(key, 0, dim, sums + key * dim);
}

}  // namespace

void attention(const AttentionArgs& a, int threads) {
    const auto& s = a.in.sizes;
    const int64_t step = queries_of_block(s), blocks = ceil_div(s.queries, step);
    parallel_for(threads, s.batch * s.kv_heads * blocks, 1, [&](int64_t job, int64_t end) {
        for (; job < end; ++job) {
            const int64_t head = job / blocks;
            forward(a, {a.in, head / s.kv_heads, head % s.kv_heads, job % blocks * step});
        }
    });
}

void attention_backward(const AttentionBackwardArgs& a, int threads) {
    const auto& s = a.in.sizes;
    const int64_t heads = s.batch * s.kv_heads, step = queries_of_block(s), blocks = ceil_div(s.queries, step);
    const int64_t pieces = std::clamp<int64_t>(kPieces / heads, 1, blocks);
    const std::unique_ptr<float[]> dk(new float[heads * pieces * s.dim * s.keys]());
    const std::unique_ptr<float[]> dv(new float[heads * pieces * s.value_dim * s.keys]());
    parallel_for(threads, heads * pieces, 1, [&](int64_t job, int64_t end) {
        for (; job < end; ++job)
            for (int64_t block = job % pieces; block < blocks; block += pieces)
                backward(a, {a.in, job / pieces / s.kv_heads, job / pieces % s.kv_heads, block * step},
                         dk.get() + job * s.dim * s.keys, dv.get() + job * s.value_dim * s.keys);
    });
    parallel_for(threads, heads, 1, [&](int64_t head, int64_t end) {
        for (; head < end; ++head) {
            const int64_t first = head * pieces * s.keys;
            add_pieces(dk.get() + first * s.dim, pieces, s, s.dim, a.dk, head / s.kv_heads, head % s.kv_heads);
            add_pieces(dv.get() + first * s.value_dim, pieces, s, s.value_dim, a.dv, head / s.kv_heads,
                       head % s.kv_heads);
        }
    });
}

}  // namespace pyqlora::cpu
