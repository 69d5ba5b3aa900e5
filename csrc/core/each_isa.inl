// Includes PYQLORA_SIMD_SOURCE, functions over a `Simd` or loops that the compiler vectorizes, once for each
// instruction set: in its namespace, beside the portable `scalar` that the including file has, and in its target
// region.
#if PYQLORA_X86
PYQLORA_TARGET(PYQLORA_AVX2)
namespace avx2 {
namespace {
#include PYQLORA_SIMD_SOURCE
}  // namespace
}  // namespace avx2
PYQLORA_TARGET_END

PYQLORA_TARGET(PYQLORA_AVX512)
namespace avx512 {
namespace {
#include PYQLORA_SIMD_SOURCE
}  // namespace
}  // namespace avx512
PYQLORA_TARGET_END
#endif
#undef PYQLORA_SIMD_SOURCE
