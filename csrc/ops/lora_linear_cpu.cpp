#include "core/dispatch.h"
#include "core/float16.h"
#include "core/parallel.h"
#include "ops/lora_linear.h"

namespace pyqlora::cpu {

void lora_dropout(const LoraDropoutArgs& a, int threads) {
    const auto seed = static_cast<uint64_t>(*a.dropout.seed.as<int64_t>());
    const uint32_t threshold = a.dropout.threshold();
    const int64_t columns = a.columns, rows = a.x.numel / columns;
    dispatch_float<Half, BFloat16>(a.x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        auto drop = [&](auto* y) {
            const T* x = a.x.as<T>();
            parallel_for(threads, rows, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t first, int64_t last) {
                for (int64_t row = first; row < last; ++row) {
                    for (int64_t i = row * columns, end = i + columns, group = 0; i < end; ++group) {
                        uint32_t bits = kept(seed, row, group, threshold);
                        for (const int64_t stop = std::min(i + 8, end); i < stop; ++i, bits >>= 1)
                            y[i] = from_float<std::decay_t<decltype(*y)>>(bits & 1 ? to_float(x[i]) : 0.0f);
                    }
                }
            });
        };
        if (a.y.dtype == DType::f32) return drop(a.y.as<float>());
        drop(a.y.as<T>());
    });
}

}  // namespace pyqlora::cpu
