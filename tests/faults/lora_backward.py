"""Faults in lora_linear's gradients."""

from faults import Fault

SOURCE = "ops/lora_backward_cuda.cu"
TESTS = "ops/test_lora_linear_cuda.py"
COMMON = "ops/lora_linear_cuda.cuh"

FAULTS = [
    Fault("missing barrier before the warps' sums are read", "            __syncthreads();\n", ""),
    Fault("one buffer for the warps' sums", "buffer ^= 1", "buffer = 0"),
    Fault("rows of s paired differently", "value(row), value(row + 4)", "value(row), value(row + 1)"),
    Fault("the other column of a pair", "c % 2 ? 0x7632 : 0x5410", "c % 2 ? 0x5410 : 0x7632"),
    Fault("last row left out", "min(m, (chunk + 1) * rows_of_chunk)", "min(m - 1, (chunk + 1) * rows_of_chunk)"),
    Fault("ranks past the last written", "if (r >= rank || column >= n) continue;", "if (column >= n) continue;"),
    Fault("ds not scaled", "= total * scale;", "= total;"),
    Fault("parts of ds in one place", "(column_block * m + row0 + row)", "(row0 + row)"),
    Fault("parts of db in one place", "(chunk * rank + r) * n", "r * n"),
    Fault("fragments of B in another order", "8 * t + 4 * half + 2 * word", "8 * t + 4 * word + 2 * half"),
    Fault("wrong lane's rows of s", "row = row0 + t + i / 2 * 8;", "row = row0 + t + i % 2 * 8;"),
    Fault("last warp's sums left out", "w < kLoraWarps; ++w", "w < kLoraWarps - 1; ++w"),
    Fault("db past the last column", "if (column + c < n) to[c] = v[c];", "if (column + c <= n) to[c] = v[c];"),
    # dB's sum of parts
    Fault("first part of dB alone", "parts + (part * rows + row0) * columns", "parts + row0 * columns", COMMON),
    Fault("dB's last ranks left out", "if (row0 >= rows) return;", "if (row0 + kVector > rows) return;", COMMON),
    Fault("dB's ranks past the last", "if (row0 + e < rows) to[e]", "if (row0 + e <= rows) to[e]", COMMON),
    Fault("dB's ranks read past the last", "row0 + e < rows ? __ldg", "true ? __ldg", COMMON),
    Fault("dB's eights in another order", "* side + unit % side) * kVector", "* side) * kVector", COMMON),
    Fault("misaligned store of dB", "rows % kVector == 0 && aligned(out.data, 16)", "aligned(out.data, 16)", COMMON),
]
