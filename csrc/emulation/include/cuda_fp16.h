// Stands in for CUDA's header of this name.
#pragma once
#include "emulation/float16.h"

using __half = emulation::Float16<pyqlora::Half>;
using __half2 = emulation::Float16Pair<pyqlora::Half>;

inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
