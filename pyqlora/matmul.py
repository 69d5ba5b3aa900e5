"""matmul_4bit: a linear map with a packed 4-bit weight, by the name and arguments of bitsandbytes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyqlora import quant
from pyqlora.ops.linear_4bit import linear_4bit
from pyqlora.quant import QuantState


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W.T + bias`, differentiable in A and bias.

    Args:
        A: [..., K] in float32, float16 or bfloat16.
        B: the packed weight, in either orientation (`B` or `B.t()`).
        quant_state: what decodes it; `quant_state.shape` is [N, K]. A rectangular weight quantized as [K, N] works too,
            decoded whole and with a DeprecationWarning, as in bitsandbytes.
        out: receives the result [..., N], if given.
        bias: [N].

    Raises:
        ValueError: no state, a state that is not two-dimensional, or tensors that do not fit each other.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is required, the state that quantize_4bit returned with B")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: quant_state.shape must be 2D [N, K], got {tuple(quant_state.shape)}")
    if A.shape[-1] == quant_state.shape[0] != quant_state.shape[1]:
        warnings.warn(
            f"matmul_4bit: the weight was quantized as [K, N] = {list(quant_state.shape)}, which is slow and will be "
            "an error. Re-quantize from the weight as [N, K] (out_features, in_features).",
            DeprecationWarning,
            stacklevel=2,
        )
        weight = quant.dequantize_4bit(B, quant_state).to(A.dtype)
        result = torch.nn.functional.linear(A, weight.t(), bias)
    else:
        result = linear_4bit(
            A,
            quant.packed_bytes(B),
            *quant_state.scales(),
            quant_state.blocksize,
            quant_state.quant_type,
            quant_state.shape,
            bias,
        )
    return result if out is None else out.copy_(result)
