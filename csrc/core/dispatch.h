// A dtype or quant type known at run time, handed to a generic lambda as a type.
#pragma once
#include "core/quant_types.h"
#include "core/tensor.h"

namespace pyqlora {

template <class T>
struct Tag {
    using type = T;
};

// f(Tag<float | half | bfloat16>), with the backend's own 16-bit types.
template <class Half, class BFloat16, class F>
void dispatch_float(DType dtype, F f) {
    switch (dtype) {
        case DType::f32:
            return f(Tag<float>{});
        case DType::f16:
            return f(Tag<Half>{});
        case DType::bf16:
            return f(Tag<BFloat16>{});
        default:
            throw std::logic_error("dispatch_float: check() let through " + std::string(name(dtype)));
    }
}

// f(Nf4{}) or f(Fp4{}).
template <class F>
void dispatch_quant_type(QuantType type, F f) {
    if (type == QuantType::nf4) return f(Nf4{});
    return f(Fp4{});
}

}  // namespace pyqlora
