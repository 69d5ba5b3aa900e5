"""Faults in lora_linear's products with activations."""

from faults import Fault

SOURCE = "ops/lora_linear_cuda.cu"
TESTS = "ops/test_lora_linear_cuda.py"

FAULTS = [
    Fault("missing barrier before sums are read", "__syncthreads();\n        if (warp < half)", "if (warp < half)"),
    Fault(
        "missing barrier before sums are replaced",
        "        __syncthreads();\n    }\n    // All warps write",
        "    }\n    // All warps write",
    ),
    Fault(
        "missing barrier before the sums are written",
        "    __syncthreads();\n    constexpr int width_of_block",
        "    constexpr int width_of_block",
    ),
    Fault("x of the step after next", "load_x(i + stride);", "load_x(i + 2 * stride);"),
    Fault("rows of x past the tile", "min(8 * i + g, rows.count - 1)", "8 * i + g"),
    Fault(
        "fragments of A in another order",
        "{b[c].word[half], b[c].word[half + 1]}",
        "{b[c].word[half + 1], b[c].word[half]}",
    ),
    Fault("dropout of another row", "apply(key, rows.first + 8 * r + g, i, a[r])", "apply(key, 8 * r + g, i, a[r])"),
    Fault(
        "a neighbour's column among stacked factors",
        "column >= factors.at[f + 1].first",
        "column > factors.at[f + 1].first",
    ),
    Fault("scale of another factor", "factors.at[f].scale;", "factors.at[0].scale;"),
    Fault("stacked results in one place", "first * m + (rows.first + row)", "(rows.first + row)"),
    Fault("splits in one place", "partial[split * m * columns + at]", "partial[at]"),
    Fault("columns of y in another order", "g / 2 * 8 + 2 * j + g % 2", "8 * j + g"),
    Fault("y added where it is to be replaced", "if (accumulate) load_vector", "if (true) load_vector"),
    Fault("rows past the tile written", "if (8 * r + g >= rows.count) continue;", ""),
    Fault("every split sums everything", "int64_t{split * kLoraWarps + warp} * kStep", "int64_t{warp} * kStep"),
    Fault("half of the warps left out", "int half = kLoraWarps / 2; half", "int half = kLoraWarps / 4; half"),
    Fault("wrong lane's sums", "row % 8, in_block % 8 / 2", "row % 8, in_block % 4"),
    Fault("columns of y past the last", "if (column + e < n) to[e] =", "if (column + e <= n) to[e] ="),
    Fault("misaligned store", "= n % kVector == 0 && aligned(a.y.data, 16);", "= aligned(a.y.data, 16);"),
]
