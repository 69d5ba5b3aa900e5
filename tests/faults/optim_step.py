"""Faults in the optimizers' step."""

from faults import Fault

SOURCE = "ops/optim_step_cuda.cu"
TESTS = "ops/test_optim_step.py"

FAULTS = [
    Fault("wrong row of the table", "table.rows[middle].first <= chunk", "table.rows[middle].first < chunk"),
    Fault(
        "norms of chunks past the last",
        "if (chunk >= table.chunks) return;\n"
        "    const Row& row = table.rows[row_of(table, chunk)];\n    const int64_t begin",
        "const Row& row = table.rows[row_of(table, chunk)];\n    const int64_t begin",
    ),
    Fault("tail read one too far", "v[i] = i < n ? to_float(x[i]) : 0.0f;", "v[i] = i <= n ? to_float(x[i]) : 0.0f;"),
    Fault(
        "tail written one too far", "if (i < n) x[i] = from_float<T>(v[i]);", "if (i <= n) x[i] = from_float<T>(v[i]);"
    ),
    Fault(
        "8-bit tail written one too far",
        "if (i < n) q[i] = static_cast<uint8_t>",
        "if (i <= n) q[i] = static_cast<uint8_t>",
    ),
    Fault("missing barrier after the maps are loaded", "    __syncthreads();\n}", "}"),
    Fault(
        "missing barrier before the scale is replaced",
        "if constexpr (kQuantized) __syncwarp();",
        "if constexpr (false) __syncwarp();",
    ),
    Fault("code of the entry above", "return code + (y > splits[code + 1]);", "return code + (y >= splits[code + 1]);"),
    Fault("negative codes mirrored wrongly", "code = 127 + (code ^", "code = 128 + (code ^"),
    Fault(
        "maximum over half of the lanes",
        "for (int lanes = 16; lanes; lanes /= 2) key = max",
        "for (int lanes = 8; lanes; lanes /= 2) key = max",
    ),
    Fault("tiny blocks divided", "largest >= FLT_MIN ?", "largest > 0.0f ?"),
    Fault("missing elements are not zero", "is_signed ? 0x7f7f7f7fu : 0u", "is_signed ? 0xffffffffu : 0xffffffffu"),
    Fault("stacked states overlap", "static_cast<S*>(row.state1) + k * row.n + i", "static_cast<S*>(row.state1) + i"),
    Fault("scale of another block", "row.absmax2 + i / kStateBlock", "row.absmax2 + (i + kStateBlock) / kStateBlock"),
    Fault(
        "scales of stacked states overlap", "k * ((row.n + kStateBlock - 1) / kStateBlock)", "k * (row.n / kStateBlock)"
    ),
    Fault("non-finite states kept", "kept = kept && fabsf(s[k]) <= FLT_MAX;", "kept = true;"),
    Fault("non-finite update kept", "p[j] = kept ? fmaf", "p[j] = true ? fmaf"),
    Fault(
        "decay after the update",
        "fmaf(-size, u, __fmul_rn(p[j], rule.decay))",
        "__fmul_rn(fmaf(-size, u, p[j]), rule.decay)",
    ),
    Fault("misaligned vectors", "aligned(row.p, 16) && aligned(row.g, 16)", "aligned(row.g, 16)"),
    Fault("misaligned stacked states", " && (stacked == 1 || n * state_bytes % state_align == 0)", ""),
    Fault("norm without the last element", "if (j >= n) continue;", "if (j + 1 >= n) continue;"),
    Fault(
        "norm of half of the lanes",
        "for (int lanes = 16; lanes; lanes /= 2) x +=",
        "for (int lanes = 8; lanes; lanes /= 2) x +=",
    ),
    Fault("norm of the first chunks only", "c < chunks; c += 32", "c < min(chunks, 32u); c += 32"),
    Fault("limit of another tensor", "norms[row.first].x = norm > limit", "norms[blockIdx.x].x = norm > limit"),
    Fault("steps of another tensor", "a.steps[order[i + 1]] != a.steps[t]", "false"),
]
