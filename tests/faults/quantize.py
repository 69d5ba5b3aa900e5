"""Faults in the kernels of quantize and dequantize."""

from faults import Fault

SOURCE = "ops/quantize_cuda.cu"
TESTS = "ops/test_quantize.py"
COMMON = "ops/quantize_cuda.cuh"

FAULTS = [
    # quantize
    Fault(
        "missing barrier before the warps' maxima",
        "    __syncthreads();\n#pragma unroll\n    for (int tile = 0; tile < kTiles; ++tile) {\n        const",
        "#pragma unroll\n    for (int tile = 0; tile < kTiles; ++tile) {\n        const",
    ),
    Fault("missing barrier before the bounds", "    __syncthreads();\n    // As integers", "    // As integers"),
    Fault("maximum over half of the lanes", "lanes < min(threads, 32)", "lanes < min(threads, 16)"),
    Fault("maximum of all warps but the last", "i < warps; ++i) key", "i < warps - 1; ++i) key"),
    Fault("maximum of the wrong warps", "(warp & ~(warps - 1))", "0"),
    Fault("maximum of the wrong tile", "warp_max[tile * (kThreads / 32) + warp] =", "warp_max[warp] ="),
    Fault(
        "sign left in the magnitude",
        "__float_as_uint(to_float(value)) & 0x7fffffffu",
        "__float_as_uint(to_float(value))",
    ),
    Fault("tail read one too far", "if (base + i < n) tail.at", "if (base + i <= n) tail.at"),
    Fault(
        "ties go up",
        "__float_as_uint(__fsub_rn(bounds[number], x)) >> 31",
        "__float_as_uint(__fsub_rn(x, bounds[number])) >> 31 ^ 1",
    ),
    Fault("bound of the next number", "table.at[number - 1]", "table.at[number % kBounds<Q>]"),
    Fault("last bound left out", "number <= kBounds<Q> ? table", "number < kBounds<Q> ? table"),
    Fault("a bound below the first", "number == 0 ? -infinity", "number == 0 ? infinity"),
    Fault("curve of another origin", "quarters + kOrigin<Q> / 4.0f", "quarters + kOrigin<Q> / 3.0f"),
    Fault("curve that falls below zero", "__fsub_rn(Q::gpu_curve, fabsf(x))", "__fsub_rn(Q::gpu_curve, x)"),
    Fault("swapped nibbles", "const int shift = 4 * (i ^ 1);", "const int shift = 4 * i;"),
    Fault("zeros with a sign", "v[i] < 0.0f) ranks", "v[i] <= 0.0f) ranks"),
    Fault("NaN without a rank", "v[i] <= 1.0f ? v[i] : 1.0f", "v[i]"),
    Fault("NaN past the end", "base + i >= n ? 0.0f : v[i]", "v[i]"),
    Fault("tail written one too far", "if (base + i < n) packed", "if (base + i <= n) packed"),
    Fault("misaligned load", "aligned(a.x.data, 16) && aligned(a.packed.data, 4)", "aligned(a.packed.data, 4)"),
    Fault("misaligned store", "aligned(a.x.data, 16) && aligned(a.q.data, 8)", "true"),
    Fault(
        "no mask on threads past the end",
        "        if (base >= n) return;\n        const int64_t block",
        "        const int64_t block",
    ),
    # 8 bits
    Fault("last midpoint not made", "if (threadIdx.x < 255)", "if (threadIdx.x < 254)"),
    Fault("code of the next midpoint", "bounds[rank + half - 1] < x", "bounds[rank + half] < x"),
    Fault("ties go down", "threadIdx.x % 2 ? nextafterf(midpoint, -2.0f) : midpoint", "midpoint"),
    Fault("ties go to the odd", "threadIdx.x % 2 ? nextafterf", "threadIdx.x % 2 == 0 ? nextafterf"),
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
        "to += kDecodeStep",
        "to += kVector",
    ),
    Fault("window forgotten", "const int64_t element = first + i;", "const int64_t element = i;"),
    Fault("misaligned window", "a.first % kVector == 0 && ", ""),
    Fault("tail decoded past the end", "i < numel; i += kDecodeThreads", "i <= numel; i += kDecodeThreads"),
    # into rows
    Fault(
        "missing barrier before the table is used for rows",
        "    __syncthreads();\n    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeVectors",
        "    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kDecodeVectors",
    ),
    Fault("gaps forgotten", "out + row * rows.stride + vector", "out + row * rows.columns + vector"),
    Fault("gaps forgotten at rows' ends", "to = out + row * rows.stride;", "to = out + row * rows.columns;"),
    Fault("window of rows forgotten", "element = first + row * rows.columns", "element = row * rows.columns"),
    Fault("window of whole vectors forgotten", "values, first + index * kVector", "values, index * kVector"),
    Fault("step into a row's end", "if (vector >= rows.vectors)", "if (vector > rows.vectors)"),
    Fault(
        "step within a row only", "kDecodeThreads / vectors, kDecodeThreads % vectors", "0, kDecodeThreads % vectors"
    ),
    Fault("rows past the last", "s < kSteps && row < rows.count", "s < kSteps"),
    Fault(
        "part of a tile taken for a whole one",
        "rows.whole && tile + kDecodeVectors <= rows.count * rows.vectors",
        "rows.whole",
    ),
    Fault("rows that do not begin at 16 bytes", "vector * kVector - lead(to)", "vector * kVector"),
    Fault("rows that begin unlike the first", "rows.count == 1 || rows.stride % boundary == 0", "true"),
    Fault("vectors of a row without its first part", "alike ? lead(out) : boundary - 1", "alike ? lead(out) : 0"),
    Fault("written before the row", "column < 0 ? -column : 0", "0"),
    Fault("written after the row", "min(rows.columns - column, int64_t{kVector})", "kVector"),
    Fault("codes before the row", "min(max(i, begin), end - 1)", "min(i, end - 1)"),
    Fault("codes after the row", "min(max(i, begin), end - 1)", "max(i, begin)"),
    Fault("one scale for two blocks", "i < left ? scale : next", "scale"),
    Fault(
        "next block's scale an element early",
        "(last << log2_blocksize) - element",
        "(last << log2_blocksize) - element - 1",
    ),
    Fault("nibble of an even first element", "(at & 1 ? 0 : 4)", "(i & 1 ? 0 : 4)"),
    Fault("row's tail taken for a vector", " && rows.columns % kVector == 0", ""),
    Fault("misaligned rows taken for whole", "words && alike && lead(out) == 0", "words && alike"),
    Fault("misaligned row taken for whole", "words && lead(out) == 0", "words"),
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
