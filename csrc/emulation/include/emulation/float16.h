// A 16-bit float type: stored bits, arithmetic in float with one rounding at the end.
#pragma once
#include "core/float16.h"
#include "cuda_runtime.h"

namespace emulation {

template <class Stored>
struct Float16 {
    Stored stored;
    Float16() = default;
    Float16(float x) : stored(pyqlora::from_float<Stored>(x)) {}
    operator float() const { return pyqlora::to_float(stored); }
};
template <class Stored>
struct alignas(4) Float16Pair {
    Float16<Stored> x, y;
};

}  // namespace emulation
