"""Faults in the kernels of quantize and dequantize."""

from faults import Fault

SOURCE = "ops/quantize_cuda.cu"
TESTS = "ops/test_quantize.py"
COMMON = "ops/quantize_cuda.cuh"

FAULTS = [
    # quantize
    Fault(
        "missing barrier before the warps' maxima", "    __syncthreads();\n    const int warps", "    const int warps"
    ),
    Fault("maximum over half of the lanes", "lanes < min(threads, 32)", "lanes < min(threads, 16)"),
    Fault("maximum of all warps but the last", "i < warps; ++i) key", "i < warps - 1; ++i) key"),
    Fault("maximum of the wrong warps", "(warp & ~(warps - 1)) + i", "(warp ^ (warps - 1)) - i"),
    Fault("sign left in the magnitude", "__float_as_uint(v[i]) & 0x7fffffffu", "__float_as_uint(v[i])"),
    Fault("tail read one too far", "base + i < n ? to_float(x", "base + i <= n ? to_float(x"),
    Fault(
        "full last block taken for a short one",
        "(block + 1) << log2_blocksize <= n",
        "(block + 1) << log2_blocksize < n",
    ),
    Fault("ties go up", "int rank = x <= middle ? 0 : 8", "int rank = x < middle ? 0 : 8"),
    Fault("wrong midpoint", "x <= bounds[rank + 3]", "x <= bounds[rank + 4]"),
    Fault("swapped nibbles", "word |= code << 4 * (i ^ 1);", "word |= code << 4 * i;"),
    Fault("tail written one too far", "if (base + i < n) packed", "if (base + i <= n) packed"),
    Fault("misaligned load", "aligned(a.x.data, 16) && aligned(a.packed.data, 4)", "aligned(a.packed.data, 4)"),
    Fault("misaligned store", "aligned(a.x.data, 16) && aligned(a.q.data, 8)", "true"),
    Fault(
        "no mask on threads past the end",
        "if (base >= n) return;\n\n    // bitsandbytes' arithmetic",
        "// bitsandbytes' arithmetic",
    ),
    # 8 bits
    Fault("last midpoint not made", "if (threadIdx.x < 255)", "if (threadIdx.x < 254)"),
    Fault("code of the next midpoint", "midpoints[rank + half - 1] < value", "midpoints[rank + half] < value"),
    Fault("swapped words", "(i < 4 ? word.x : word.y) |= rank", "(i < 4 ? word.y : word.x) |= rank"),
    # dequantize
    Fault(
        "missing barrier before the table is used",
        "    __syncthreads();\n    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeTile;",
        "    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeTile;",
    ),
    Fault("scale of another block", "stored[s] = scales.load(element >>", "stored[s] = scales.load(element + 8 >>"),
    Fault("swapped nibbles when decoding", "values[word[s] >> 4 * (i ^ 1) & 15]", "values[word[s] >> 4 * i & 15]"),
    Fault("swapped nibbles in the tail", "(element % 2 ? 0 : 4)", "(element % 2 ? 4 : 0)"),
    Fault(
        "stores of different threads overlap",
        "store_vector(out + base + s * kDecodeStep",
        "store_vector(out + base + s * kVector",
    ),
    Fault("window forgotten", "const int64_t element = first + i;", "const int64_t element = i;"),
    Fault("misaligned window", "a.first % kVector == 0 && ", ""),
    Fault("tail decoded past the end", "min(tile + kDecodeTile, numel)", "tile + kDecodeTile"),
    Fault(
        "mean of the scales forgotten",
        "map[stored.code], stored.absmax), mean)",
        "map[stored.code], stored.absmax), 0)",
        COMMON,
    ),
    Fault(
        "scale of the scales of another block",
        "block >> log2_nested_blocksize",
        "block >> (log2_nested_blocksize + 1)",
        COMMON,
    ),
    Fault(
        "missing barrier before the 8-bit table is used",
        "    __syncthreads();\n    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeStep,",
        "    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeStep,",
    ),
    Fault(
        "8-bit tail read as a vector",
        "base + kVector <= n) {\n        const uint2 word = __ldg",
        "base < n) {\n        const uint2 word = __ldg",
    ),
]
