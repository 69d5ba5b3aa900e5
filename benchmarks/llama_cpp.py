"""Greedy decoding beside llama.cpp (PyPI's xllamacpp) on the same model: CPU milliseconds a token.

`python -m benchmarks.llama_cpp [MODEL.gguf] [--tokens 64] [--rounds 5] [--threads 1] [--json FILE]`

The model is the demo's, SmolLM2-135M-Instruct in Q4_1, if no other is given. llama.cpp runs that file, and the same
weights in F16 and Q8_0; pyqlora has them in NF4 and all else in the dtype named, and runs through transformers'
generate in inference mode. The adapter is r=16 on all projections, unmerged on both sides. Implementations take turns;
a token's time is that of `tokens` more than one after the same prompt, and counts all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import xllamacpp

import pyqlora
from benchmarks import harness
from benchmarks.models import PROJECTIONS
from pyqlora.finetune.demo import find_model
from pyqlora.finetune.load import Source, load_lora
from pyqlora.functional import set_activation_precision
from pyqlora.integrations.gguf_adapter import write_adapter
from pyqlora.integrations.gguf_write import KINDS, write_model

PROMPT = "The first thing to know about the sea is that"
CPU = torch.device("cpu")
HEADER = """| | CPU ms a token | spread | tokens per CPU s | over the first |
|---|---|---|---|---|"""
Generate = Callable[[int], str]  # from a number of tokens to the text


def save_adapter(source: Source, path: Path) -> None:
    """An adapter whose update is not zero."""
    torch.manual_seed(0)
    config = pyqlora.LoraConfig(
        r=16, lora_alpha=32, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = pyqlora.get_peft_model(source.base(CPU, torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    model.save_pretrained(path)


def by_transformers(model: Any, tokenizer: Any, activations: str = "float32") -> Generate:
    model.eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    @torch.inference_mode()
    def generate(tokens: int) -> str:
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        before = set_activation_precision(activations)
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        set_activation_precision(before)
        return tokenizer.decode(new[0, ids.shape[1] :])

    return generate


def by_llama_cpp(path: Path, tokenizer: Any, threads: int, adapter: Path | None = None) -> Generate:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.n_ctx, params.n_parallel, params.verbosity = 0, 1024, 1, -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    request = {"prompt": tokenizer(PROMPT).input_ids, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return lambda tokens: server.handle_completions({**request, "n_predict": tokens})["choices"][0]["text"]


def implementations(gguf: Path, directory: Path, threads: int) -> dict[str, Generate]:
    source = Source(str(gguf))
    tokenizer = source.tokenizer()
    save_adapter(source, directory / "adapter")
    write_adapter(directory / "adapter", source.config(), directory / "adapter.gguf")
    dense = source.original(CPU, torch.float32)
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"pyqlora, NF4 in {str(dtype).removeprefix('torch.')}"
        adapted = load_lora(source.base(CPU, dtype), str(directory / "adapter"))
        runs[f"{name}, adapter"] = by_transformers(adapted, tokenizer)
        runs[f"{name}, adapter, activations in int16"] = by_transformers(adapted, tokenizer, "int16")
        runs[name] = by_transformers(source.base(CPU, dtype), tokenizer)
    files = {"the file": gguf}
    for kind in KINDS:
        files[kind.upper()] = directory / f"{kind}.gguf"
        write_model(dense, tokenizer, files[kind.upper()], kind)
    for kind, path in files.items():
        runs[f"llama.cpp, {kind}, adapter"] = by_llama_cpp(path, tokenizer, threads, directory / "adapter.gguf")
        runs[f"llama.cpp, {kind}"] = by_llama_cpp(path, tokenizer, threads)
    same = by_transformers(load_lora(dense, str(directory / "adapter")), tokenizer)
    assert runs["llama.cpp, F16, adapter"](16) == same(16), "llama.cpp and transformers disagree on the same weights"
    return runs


def cpu_ms(generate: Generate, tokens: int) -> float:
    start = time.process_time()
    generate(1)
    middle = time.process_time()
    generate(1 + tokens)
    return (time.process_time() - middle - (middle - start)) / tokens * 1e3


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=__doc__.split("\n")[0])
    parser.add_argument("gguf", nargs="?", type=Path, metavar="MODEL.gguf", help="default: the demo's model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the machine and every result here")
    arguments = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    machine = harness.machine(arguments.threads)
    machine |= {"llama.cpp": f"xllamacpp {xllamacpp.__version__}: {xllamacpp.get_system_info()}"}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        runs = implementations(arguments.gguf or Path(find_model()), Path(directory), arguments.threads)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                samples[name].append(cpu_ms(run, arguments.tokens))
    print(f"\n{HEADER}")
    medians = {name: statistics.median(times) for name, times in samples.items()}
    first = next(iter(medians.values()))
    for name, ms in medians.items():
        spread = f"{min(samples[name]):.1f}–{max(samples[name]):.1f}"
        print(f"| {name} | {ms:.1f} | {spread} | {1e3 / ms:.1f} | {first / ms:.2f}x |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "ms a token": samples}, indent=1))


if __name__ == "__main__":
    main()
