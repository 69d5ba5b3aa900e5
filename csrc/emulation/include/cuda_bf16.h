// Stands in for CUDA's header of this name.
#pragma once
#include "emulation/float16.h"

using __nv_bfloat16 = emulation::Float16<pyqlora::BFloat16>;
using __nv_bfloat162 = emulation::Float16Pair<pyqlora::BFloat16>;

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
