// optim_step: one step of one optimizer over many tensors in one call. 32-bit states are float32 tensors of the
// parameter's shape; 8-bit states are codes on a dynamic map in blocks of 256 elements, with one absmax per block.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/optim_rules.h"
#include "core/tensor.h"

namespace pyqlora {

constexpr int64_t kStateBlock = 256;

// Sums of squares are taken in double and in one order on every backend. Of a chunk of 2048 elements each of 32 lanes
// adds those with i % 256 / 8 == lane, of a tensor those chunks with c % 32 == lane; then the upper half of the lanes
// is added to the lower one, until one is left.
constexpr int64_t kNormChunk = 8 * kStateBlock, kNormChunkBytes = 2 * sizeof(double);

// The lists are parallel. Rules of one state leave state2 and absmax2 empty; AdEMAMix stacks its two averages in state1
// [2, ...] and absmax1 [2, blocks]. An update that would make a state non-finite is left out: that element keeps its
// parameter and its states.
struct OptimStepArgs {
    OptimRule rule;
    Hyper hyper;
    std::vector<int64_t> steps;             // counted from 1
    std::vector<TensorRef> params, grads;   // f32, f16 or bf16, one dtype for all
    std::vector<TensorRef> state1, state2;  // f32, or u8 where the maps are defined
    std::vector<TensorRef> absmax1, absmax2;
    TensorRef qmap1, qmap2;        // f32 [256]: the signed and the unsigned dynamic map
    double max_unorm = 0;          // above 0: |u| is held to max_unorm * |p|, tensor by tensor (LAMB, LARS)
    std::vector<TensorRef> unorm;  // f32 [1] each: |u|, out; only with max_unorm
    TensorRef workspace;           // u8, 16 bytes a chunk of 2048 elements of each tensor; only with max_unorm

    bool quantized() const { return qmap1.defined(); }
};

inline void check(const OptimStepArgs& a, Device device) {
    const char* op = "optim_step";
    dispatch_rule(a.rule, [&](auto tag) {
        using Rule = typename decltype(tag)::type;
        constexpr int64_t stacked = Rule::signed_states;
        constexpr bool two = Rule::states > stacked;
        if (a.quantized()) {
            check_tensor(op, "qmap1", a.qmap1, device, {DType::f32}, 256);
            if (two) check_tensor(op, "qmap2", a.qmap2, device, {DType::f32}, 256);
        }
        if (a.max_unorm > 0) {
            int64_t bytes = 0;
            for (const TensorRef& p : a.params) bytes += ceil_div(p.numel, kNormChunk) * kNormChunkBytes;
            check_tensor(op, "workspace", a.workspace, device, {DType::u8});
            if (a.workspace.numel < bytes)
                bad_argument(op, "workspace", std::to_string(bytes) + " elements or more",
                             std::to_string(a.workspace.numel));
        }
        const DType state = a.quantized() ? DType::u8 : DType::f32;
        for (size_t i = 0; i < a.params.size(); ++i) {
            const TensorRef& p = a.params[i];
            const int64_t n = p.numel, blocks = ceil_div(n, kStateBlock);
            check_tensor(op, "params", p, device, {DType::f32, DType::f16, DType::bf16});
            check_tensor(op, "params", p, device, {a.params[0].dtype});
            check_tensor(op, "grads", a.grads[i], device, {p.dtype}, n);
            check_tensor(op, "state1", a.state1[i], device, {state}, stacked * n);
            if (two) check_tensor(op, "state2", a.state2[i], device, {state}, n);
            if (a.quantized()) check_tensor(op, "absmax1", a.absmax1[i], device, {DType::f32}, stacked * blocks);
            if (a.quantized() && two) check_tensor(op, "absmax2", a.absmax2[i], device, {DType::f32}, blocks);
            if (a.max_unorm > 0) check_tensor(op, "unorm", a.unorm[i], device, {DType::f32}, 1);
            if (a.steps[i] < 1) bad_argument(op, "steps", "1 or more", std::to_string(a.steps[i]));
            check_same_device(op, {{"params", p}, {"grads", a.grads[i]}, {"state1", a.state1[i]}});
        }
    });
}

namespace cpu {
void optim_step(const OptimStepArgs& a, int threads);
}
namespace cuda {
void optim_step(const OptimStepArgs& a, void* stream);
}

}  // namespace pyqlora
