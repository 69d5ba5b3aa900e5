"""swiglu: y = gate · sigmoid(gate) · up, element by element, on a CPU.

Computed in float32 and rounded once to the dtype of gate and up, where torch's silu and product round twice. Kept for
the backward pass are gate and up. On a GPU torch's own operations are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops.backend import fast_on_cpu, native
from pyqlora.ops.output import empty_output

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` takes these, and is fast."""
    return fast_on_cpu(gate, up) and gate.dtype in _FLOATS and gate.dtype == up.dtype and gate.shape == up.shape


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = empty_output(gate, gate.shape)
        module, threads = native(gate)
        module.swiglu(gate, up, y, threads)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = empty_output(gate, gate.shape), empty_output(up, up.shape)
        module, threads = native(gate)
        module.swiglu_backward(gate, up, dy.contiguous(), dgate, dup, threads)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate, up: of one shape and dtype: float32, float16 or bfloat16.

    Returns:
        Like gate. Differentiable once in both.

    Raises:
        ValueError: an argument has the wrong dtype or size; the message names it.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: expected gate and up of one shape, got {list(gate.shape)} and {list(up.shape)}")
    return _Swiglu.apply(gate, up)
