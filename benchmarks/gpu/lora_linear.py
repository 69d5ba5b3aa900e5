"""A 4-bit linear layer under a LoRA adapter of rank 16, forward and backward; the peer is PEFT on bitsandbytes, and
"torch" is the bf16 layer without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.machine import HAVE_PEFT, Case, Gpu

RANK = 16
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
ROWS = [1, 16, 512, 2048, 4096]


class Layer(torch.nn.Module):
    """What an adapter is put on."""

    def __init__(self, proj: torch.nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def adapted(gpu: Gpu, n: int, k: int, library: str) -> torch.nn.Module:
    """The layer in 4 bits under an adapter, by "pyqlora" or by "peer"."""
    if library == "pyqlora":
        from pyqlora import LoraConfig, get_peft_model
        from pyqlora.nn import Linear4bit
    else:
        from bitsandbytes.nn import Linear4bit
        from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    layer = Layer(Linear4bit(k, n, **options).to(torch.bfloat16)).to(gpu.device)
    model = get_peft_model(layer, LoraConfig(r=RANK, lora_alpha=32, target_modules=["proj"]))
    return model.to(torch.bfloat16)


def cases(gpu: Gpu) -> Iterator[Case]:
    for n, k in gpu.sizes(SHAPES, [(48, 128)]):
        dense = torch.nn.Linear(k, n, bias=False, device=gpu.device, dtype=torch.bfloat16).requires_grad_(False)
        models = {"pyqlora": adapted(gpu, n, k, "pyqlora")}
        if HAVE_PEFT:
            models["peer"] = adapted(gpu, n, k, "peer")
        models["torch"] = dense
        for m in gpu.sizes(ROWS, [2, 70]):
            x = torch.randn(m, k, device=gpu.device, dtype=torch.bfloat16)
            dy = torch.randn(m, n, device=gpu.device, dtype=torch.bfloat16)
            flops = 2 * m * n * k + 2 * m * RANK * (n + k)

            def forward(model, x=x):
                with torch.no_grad():
                    return model(x)

            def both(model, x=x, dy=dy):
                leaf = x.detach().requires_grad_()
                model(leaf).backward(dy)
                return leaf.grad

            for what, run, work in (("forward", forward, flops), ("forward+backward", both, 2 * flops)):
                runs = {name: lambda model=model, run=run: run(model) for name, model in models.items()}
                yield Case(f"lora_linear {what} {n}x{k} M={m}", runs, flops=work)
