"""A token of a Llama-3-8B with random weights, after others in a static cache: eagerly, and as a replayed CUDA graph,
which no host is waited for in; the peer is bitsandbytes, with PEFT where there are adapters, and "torch" the dense
model in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.machine import HAVE_BITSANDBYTES, HAVE_PEFT, HAVE_TRANSFORMERS, Case, Gpu
from benchmarks.gpu.quantize import PACKED_TWICE
from benchmarks.gpu.training import LLAMA_3_8B, TARGETS, TINY, random_model, weights_of

PAST, RANK = 256, 16
DENSE = 40 << 30  # bytes of a GPU on which the dense model is measured too


def model_of(gpu: Gpu, library: str, adapted: bool) -> torch.nn.Module:
    """By "pyqlora", "peer" or "torch"."""
    if library == "torch":
        return random_model(gpu, None).eval()
    if library == "pyqlora":
        from pyqlora import LoraConfig, get_peft_model
        from pyqlora.nn import Linear4bit
    else:
        from bitsandbytes.nn import Linear4bit

        if adapted:
            from peft import LoraConfig, get_peft_model
    model = random_model(gpu, Linear4bit)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS)).to(torch.bfloat16)
    return model.eval()


def decoder(gpu: Gpu, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
    """A function that computes the logits after one more token, the same each time."""
    from transformers import StaticCache

    past = gpu.sizes(PAST, 8)
    cache = StaticCache(config=model.config, max_cache_len=2 * past)
    vocabulary = gpu.sizes(LLAMA_3_8B, TINY)["vocab_size"]
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (1, past), device=gpu.device)
    position = torch.full((1, 1), past, device=gpu.device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(past)
        return model(input_ids=tokens[:, :1], position_ids=position, past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return step


def graphs(gpu: Gpu, steps: dict[str, Callable]) -> dict[str, Callable]:
    """The steps as graphs; a peer whose step cannot be captured is left out, which is said."""
    captured = {}
    for name, step in steps.items():
        try:
            captured[name] = gpu.graph(step)
        except RuntimeError as error:
            if name == "pyqlora":
                raise
            print(f"{name} cannot be captured as a graph: {error}")
    return captured


def cases(gpu: Gpu) -> Iterator[Case]:
    if not HAVE_TRANSFORMERS:
        return
    packed, dense = weights_of(gpu)
    for adapted in (False, True):
        steps = {"pyqlora": decoder(gpu, model_of(gpu, "pyqlora", adapted))}
        if HAVE_PEFT if adapted else HAVE_BITSANDBYTES:
            steps["peer"] = decoder(gpu, model_of(gpu, "peer", adapted))
        if gpu.tiny or torch.cuda.get_device_properties(gpu.device).total_memory > DENSE:
            steps["torch"] = decoder(gpu, model_of(gpu, "torch", adapted))

        def finite(steps=steps):
            for name, step in steps.items():
                assert step().isfinite().all(), name

        what = "decode a token" + (", adapters" if adapted else "")
        size = packed * PACKED_TWICE + 2 * dense
        yield Case(f"{what}, eagerly", steps, size, check=finite)
        yield Case(f"{what}, graph", graphs(gpu, steps), size)
