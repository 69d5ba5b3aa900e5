"""A QLoRA step of a Llama-3-8B with random weights: forward, backward with gradient checkpointing, optimizer; the peer
is PEFT on bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.machine import HAVE_PEFT, HAVE_TRANSFORMERS, Case, Gpu

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = [(1, 512), (1, 2048), (4, 1024)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_model(gpu: Gpu, linear_4bit: type[torch.nn.Module] | None) -> torch.nn.Module:
    """With each projection packed as soon as it is made: no more than one layer is ever dense on the GPU. None: dense,
    in bf16.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**gpu.sizes(LLAMA_3_8B, TINY))).to(torch.bfloat16)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if linear_4bit and isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS:
            options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            with gpu.device:
                packed = linear_4bit(module.in_features, module.out_features, **options).to(torch.bfloat16)
            model.set_submodule(name, packed.to(gpu.device))
    for module in model.modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.is_meta}
        for name, p in own.items():
            values = torch.randn(p.shape, device=gpu.device, dtype=p.dtype) * 0.02
            module.register_parameter(name, torch.nn.Parameter(1 + values if p.dim() == 1 else values))
    with gpu.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def trainer(gpu: Gpu, library: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that trains one step on a batch and returns its loss."""
    if library == "pyqlora":
        from pyqlora import LoraConfig, get_peft_model
        from pyqlora.nn import Linear4bit
        from pyqlora.optim import PagedAdamW8bit
    else:
        from bitsandbytes.nn import Linear4bit
        from bitsandbytes.optim import PagedAdamW8bit
        from peft import LoraConfig, get_peft_model
    model = random_model(gpu, Linear4bit)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).train()
    optimizer = PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def weights_of(gpu: Gpu) -> tuple[int, int]:
    """How many the projections have, and the output layer."""
    size = gpu.sizes(LLAMA_3_8B, TINY)
    hidden, kv = size["hidden_size"], size["hidden_size"] * size["num_key_value_heads"] // size["num_attention_heads"]
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * size["intermediate_size"]
    return size["num_hidden_layers"] * layer, hidden * size["vocab_size"]


def cases(gpu: Gpu) -> Iterator[Case]:
    if not HAVE_TRANSFORMERS:
        return
    steps = {"pyqlora": trainer(gpu, "pyqlora")}
    if HAVE_PEFT:
        steps["peer"] = trainer(gpu, "peer")
    size = gpu.sizes(LLAMA_3_8B, TINY)
    weights = sum(weights_of(gpu))
    for batch, length in gpu.sizes(TOKENS, [(1, 16)]):
        tokens = torch.randint(size["vocab_size"], (batch, length), device=gpu.device)

        def finite(tokens=tokens):
            for name, step in steps.items():
                assert step(tokens).isfinite(), name

        runs = {name: lambda step=step, tokens=tokens: step(tokens) for name, step in steps.items()}
        # Forward twice (checkpointing) and the gradient of the activations: 2 floating-point operations a weight each.
        yield Case(f"QLoRA step {batch}x{length} tokens", runs, flops=6 * weights * batch * length, check=finite)
