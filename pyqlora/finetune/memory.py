"""Memory: what is free, what is used, what a run will need."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyqlora.finetune.options import Options

# Values kept for the backward pass per token and decoder layer, in widths of the hidden and the intermediate size:
# norms, projections and their LoRA inputs, attention, gate, up and their product.
HIDDEN_COPIES, INTERMEDIATE_COPIES = 14, 6
LOGIT_COPIES = 3  # logits in the compute type, in float32, and their gradient
STATE_BYTES = {"paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "adamw_torch": 8}
COMFORTABLE = 0.7  # share of the free memory that a run may take before it recomputes activations instead


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose: what the process holds with the model loaded, and what training adds."""

    now: int
    model: int
    adapter: int
    activations: int
    free: int
    recompute: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.now + self.adapter + self.activations


def free_bytes(device: torch.device) -> int:
    """Memory that is still available on the device: the GPU's, or the machine's within its cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(available, limit - used)
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return available


def used_bytes(device: torch.device) -> int:
    """Memory in use now: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The highest use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tensor_bytes(model: Any, trained: bool) -> int:
    """Bytes of the parameters that are trained, or of everything else; tied ones count once."""
    tensors = {p.data_ptr(): p.nbytes for p in model.parameters() if p.requires_grad == trained}
    if not trained:
        tensors |= {buffer.data_ptr(): buffer.nbytes for buffer in model.buffers()}
        for module in model.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                tensors[state.absmax.data_ptr()] = state.absmax.nbytes
    return sum(tensors.values())


def estimate(model: Any, options: Options, batch_tokens: int, batch_trained: int, dtype: torch.dtype) -> Estimate:
    """What training will need; activations are recomputed in the backward pass where they would not fit well.

    Args:
        model: the model under its adapter.
        options: for the optimizer.
        batch_tokens: tokens of the largest micro-batch, padding included.
        batch_trained: of these, the positions that logits are computed for.
        dtype: of the computation.
    """
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    weights, trained = tensor_bytes(model, trained=False), tensor_bytes(model, trained=True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = trained + count * STATE_BYTES[options.optim]
    hidden = getattr(config, "hidden_size", 0)
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = getattr(config, "num_hidden_layers", 1)
    layer = batch_tokens * dtype.itemsize * (HIDDEN_COPIES * hidden + INTERMEDIATE_COPIES * intermediate)
    logits = batch_trained * config.vocab_size * (4 * (LOGIT_COPIES - 1) + dtype.itemsize)
    free = free_bytes(device)
    everything = layer * layers + logits
    recompute = adapter + everything > COMFORTABLE * free
    if recompute:
        everything = batch_tokens * dtype.itemsize * hidden * layers + layer + logits
    return Estimate(used_bytes(device), weights, adapter, everything, free, recompute)
