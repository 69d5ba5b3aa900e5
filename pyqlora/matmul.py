"""matmul_4bit: a linear map with a packed 4-bit weight, by the name and arguments of bitsandbytes."""

from __future__ import annotations

from torch import Tensor

from pyqlora.ops.linear_4bit import linear_4bit
from pyqlora.quant import QuantState, packed_bytes


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W.T + bias`, differentiable in A and bias.

    Args:
        A: [..., K] in float32, float16 or bfloat16.
        B: the packed weight, in either orientation (`B` or `B.t()`).
        quant_state: what decodes it; `quant_state.shape` is [N, K].
        out: receives the result [..., N], if given.
        bias: [N].

    Raises:
        ValueError: no state, a state that is not two-dimensional, or tensors that do not fit each other.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is required, the state that quantize_4bit returned with B")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: quant_state.shape must be 2D [N, K], got {tuple(quant_state.shape)}")
    result = linear_4bit(
        A,
        packed_bytes(B),
        *quant_state.scales(),
        quant_state.blocksize,
        quant_state.quant_type,
        quant_state.shape,
        bias,
    )
    return result if out is None else out.copy_(result)
