"""Where the installed bitsandbytes is off, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor


def decoded_alike(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether decoded tensors have equal bits, any NaN being as good as another; `exact` is decoded to float32.

    On a machine with a GPU, bitsandbytes loads a library whose CPU code rounds to float16 without the processor's
    instruction: ties away from zero, and what is below the smallest float16 to zero. There ours must be `exact` rounded
    to nearest even, and theirs off by half a unit in the last place, or by the smallest float16.
    """
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not ours.isnan().equal(theirs.isnan()):
        return False
    ours, theirs, exact = (x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for x in (ours, theirs, exact))
    if ours.equal(theirs):
        return True
    from bitsandbytes.cextension import lib

    if ours.dtype != torch.float16 or not lib.compiled_with_cuda or not ours.equal(exact.half()):
        return False
    allowed = (exact.abs() * 2**-11).clamp(min=2**-24)
    return bool(((ours == theirs) | ((theirs.float() - exact).abs() <= allowed)).all())
