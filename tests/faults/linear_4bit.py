"""Faults in linear_4bit without tensor cores."""

from faults import Fault

SOURCE = "ops/linear_4bit_cuda.cu"
TESTS = "ops/test_linear_4bit_cuda.py"

FAULTS = [
    Fault("missing barrier before the table is used", "    __syncthreads();\n    const int lane", "    const int lane"),
    Fault("packed bytes read one too far", "if (e / 2 + i < bytes)", "if (e / 2 + i <= bytes)"),
    Fault("swapped nibbles", "w[i] = values[codes >> 4 * (i ^ 1) & 15]", "w[i] = values[codes >> 4 * i & 15]"),
    Fault("scale of another block", "scales[e >> log2_blocksize]", "scales[e + kVector >> log2_blocksize]"),
    Fault("weights of the row before", "if (e + i < begin || e + i >= end)", "if (e + i >= end)"),
    Fault("weights of the row after", "if (e + i < begin || e + i >= end)", "if (e + i < begin)"),
    Fault("vectors across rows", "a.k % kVector == 0 && ", ""),
    Fault("misaligned load", " && aligned(a.packed.data, 4) && aligned(a.x.data, 16)", ""),
    Fault("rows of x past the last", "min(first + r, m - 1)", "(first + r)"),
    Fault("rows of y past the last", "lane == 0 && first + r < m", "lane == 0"),
    Fault("columns past the last", "if (column >= n) return;", ""),
    Fault("sum over half of the lanes", "int lanes = 16; lanes; lanes /= 2", "int lanes = 8; lanes; lanes /= 2"),
    Fault("bias of another column", "sum[r] + bias[column]", "sum[r] + bias[column ^ 1]"),
    Fault("transposed output", "y[(first + r) * n + column]", "y[column * m + first + r]"),
]
