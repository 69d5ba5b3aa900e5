"""Faults in linear_4bit on tensor cores."""

from faults import Fault

SOURCE = "ops/linear_4bit_mma_cuda.cu"
TESTS = "ops/test_linear_4bit_cuda.py"

FAULTS = [
    Fault(
        "missing barrier before the tables are used",
        "__ldg(scales.offset) : 0.0f;\n    __syncthreads();",
        "__ldg(scales.offset) : 0.0f;",
    ),
    Fault(
        "missing barrier before sums replace the tables",
        "where the tables were.\n    __syncthreads();",
        "where the tables were.",
    ),
    Fault("missing barrier before the sums are read", "    __syncthreads();\n    for (int unit", "    for (int unit"),
    Fault("fragments of W in another order", "[i % 2 + byte % 2 * 2]", "[i % 2 * 2 + byte % 2]"),
    Fault("fragments of x in another order", "{{low.x, low.y}, {low.z, low.w}", "{{low.x, low.z}, {low.y, low.w}"),
    Fault(
        "wrong lane's rows",
        "lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;",
        "lane = threadIdx.x % 32, g = lane % 8, t = lane / 8;",
    ),
    Fault(
        "swapped nibbles", "pack<T>(table.at[(byte + first) / 16], low)", "pack<T>(low, table.at[(byte + first) / 16])"
    ),
    Fault(
        "wrong byte of the codes",
        "byte < 4 ? codes[s][i].x : codes[s][i].y",
        "byte < 4 ? codes[s][i].y : codes[s][i].x",
    ),
    Fault("scale of another step", "scale[i], lane - t + s)", "scale[i], lane)"),
    Fault("scale of another row", "step_scale[2 * tile + i / 2]", "step_scale[2 * tile + i % 2]"),
    Fault("scales not fetched ahead", "load_scales(group + slices);", "load_scales(group);"),
    Fault(
        "half of the 8-bit scales' table",
        "if (scales.codes) map[threadIdx.x]",
        "if (scales.codes && threadIdx.x < 128) map[threadIdx.x]",
    ),
    Fault("steps past the last", "if (step >= steps) break;", ""),
    Fault("codes past the last step", "if (of_group * kGroup + s >= steps) return;", ""),
    Fault(
        "rows of W past the last",
        "min(row_warp * 16 * Tile::row_tiles + 8 * i + g, last_row) * row_pitch",
        "(row_warp * 16 * Tile::row_tiles + 8 * i + g) * row_pitch",
    ),
    Fault("rows of x past the last", "min(8 * i + g, m - 1)", "(8 * i + g)"),
    Fault("splits write over each other", "partial + split * m * n", "partial"),
    Fault("every split sums everything", "int group = split * Tile::k_warps + k_warp;", "int group = k_warp;"),
    Fault("last split left out", "split < splits; ++split", "split < splits - 1; ++split"),
    Fault(
        "order of the sum depends on the block",
        "from = partial + (split * m",
        "from = partial + ((split + blockIdx.x) % splits * m",
    ),
    Fault("last warp's sums left out", "w < Tile::k_warps; ++w", "w < max(1, Tile::k_warps - 1); ++w"),
    Fault("wrong lane's sums", "* 16 + g + i / 2 * 8;", "* 16 + g + i % 2 * 8;"),
    Fault(
        "bias in every split",
        "if (splits > 1) {\n            store",
        "if (splits > 1) {\n            add_bias(bias, column, n, v);\n            store",
    ),
    Fault("bias of another column", "v[i] += bias[min(column + i, n - 1)]", "v[i] += bias[min(column + i + 1, n - 1)]"),
    Fault("bias past the last column", "bias[min(column + i, n - 1)]", "bias[column + i]"),
    Fault("columns past the last", "if (column + i < n) out[row", "if (column + i <= n) out[row"),
    Fault("misaligned store", "l.n % kVector == 0 && aligned(l.y.data, 16)", "aligned(l.y.data, 16)"),
    Fault("sums of another token", "token * 8 + 2 * t + i % 2)", "token * 8 + t + i % 2 * 4)"),
    Fault("tokens past the last", "if (token >= m) return;", ""),
    Fault("update's rows past the last", "min(8 * token + g, m - 1) * update.rank", "(8 * token + g) * update.rank"),
    Fault("update in every warp of a split", "int step = k_warp; split == 0", "int step = 0; split == 0"),
]
