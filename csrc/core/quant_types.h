// The 4-bit data types: one struct each with its table, its encode and its decode, for host and device.
//
// Layout of packed weights: element 2j is the high nibble of byte j, element 2j+1 the low one; the last low nibble of
// an odd count holds the code of 0. absmax[i] = max |w| over block i, float32; a value is code * absmax.
// Double quantization: absmax itself as uint8 codes, absmax[i] = nested_code[codes[i]] * nested_absmax[i / 256] +
// offset.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#define PYQLORA_HD __host__ __device__ __forceinline__
#else
#define PYQLORA_HD inline
#endif

namespace pyqlora {

enum class QuantType : uint8_t { nf4, fp4 };

inline QuantType quant_type(const std::string& text) {
    if (text == "nf4") return QuantType::nf4;
    if (text == "fp4") return QuantType::fp4;
    throw std::invalid_argument("quant_type: expected 'nf4' or 'fp4', got '" + text + "'");
}

// A type's `values` are its codes in index order. To encode x (already divided by absmax): count the `bounds` that are
// below x; `order` turns that rank into the code. The bounds are the float32 midpoints of neighbouring values. "Below"
// means !(x <= bound), so a NaN gets the last rank; the absmax of its block is NaN too. The bounds and order on a GPU
// are others, since bitsandbytes' own differ between its CPU and CUDA code; there 4x(gpu_curve - |x|) comes closest to
// another whole number at each bound, from one to the next.
struct Nf4 {
    static constexpr QuantType type = QuantType::nf4;
    static constexpr float values[16] = {
        -1.0f,
        -0.6961928009986877f,
        -0.5250730514526367f,
        -0.39491748809814453f,
        -0.28444138169288635f,
        -0.18477343022823334f,
        -0.09105003625154495f,
        0.0f,
        0.07958029955625534f,
        0.16093020141124725f,
        0.24611230194568634f,
        0.33791524171829224f,
        0.44070982933044434f,
        0.5626170039176941f,
        0.7229568362236023f,
        1.0f,
    };
    static constexpr float bounds[15] = {
        -0.8480963706970215f,  -0.6106328964233398f,  -0.4599952697753906f,   -0.33967941999435425f,
        -0.23460739850997925f, -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f,
        0.120255246758461f,    0.2035212516784668f,   0.2920137643814087f,    0.3893125355243683f,
        0.5016634464263916f,   0.6427869200706482f,   0.8614784479141235f,
    };
    static constexpr uint8_t order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static constexpr float gpu_bounds[15] = {
        -0.84809643f, -0.6106329f, -0.45999527f, -0.33967942f, -0.2346074f, -0.13791174f, -0.045525018f, 0.03979015f,
        0.120255254f, 0.20352125f, 0.29201376f,  0.38931254f,  0.5016634f,  0.6427869f,   0.8614784f,
    };
    static constexpr const uint8_t (&gpu_order)[16] = order;
    static constexpr float gpu_curve = 3.0f;
};

// Sign in bit 3; magnitudes are not in code order. Code 8 is a positive zero.
struct Fp4 {
    static constexpr QuantType type = QuantType::fp4;
    static constexpr float values[16] = {
        0.0f,
        0.0052083334885537624f,
        0.6666666865348816f,
        1.0f,
        0.3333333432674408f,
        0.5f,
        0.1666666716337204f,
        0.25f,
        0.0f,
        -0.0052083334885537624f,
        -0.6666666865348816f,
        -1.0f,
        -0.3333333432674408f,
        -0.5f,
        -0.1666666716337204f,
        -0.25f,
    };
    static constexpr float bounds[15] = {
        -0.8333333730697632f,   -0.5833333730697632f, -0.4166666865348816f,    -0.2916666865348816f,
        -0.2083333432674408f,   -0.0859375f,          -0.0026041667442768812f, 0.0f,
        0.0026041667442768812f, 0.0859375f,           0.2083333432674408f,     0.2916666865348816f,
        0.4166666865348816f,    0.5833333730697632f,  0.8333333730697632f,
    };
    static constexpr uint8_t order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    // On a GPU these bound |x|, and whatever is below zero has the sign.
    static constexpr float gpu_bounds[7] = {
        0.00260417f, 0.0859375f, 0.20833333f, 0.29166666f, 0.4166667f, 0.583333f, 0.8333333f,
    };
    static constexpr uint8_t gpu_order[8] = {0, 1, 6, 7, 4, 5, 2, 3};
    static constexpr float gpu_curve = 2.6f;
};

}  // namespace pyqlora
