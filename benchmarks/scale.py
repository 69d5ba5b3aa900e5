"""QLoRA training steps of a Llama of any size from bfloat16 shards on this machine: time and peak memory of every part.

`python -m benchmarks.scale [llama-3-8b|llama-3.2-1b|smollm2-135m] [--directory DIR]`

The recipe: NF4 with double quantization through transformers, LoRA r=16 on all linear layers, gradient checkpointing,
paged 8-bit AdamW, computing in bfloat16. Random weights are written to DIR first, if it does not hold them yet (16 GB
for 8 billion parameters); what `pyqlora estimate` says is printed before anything is loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import pyqlora
from benchmarks.meter import HEADER, Meter, Part, hide_gpus, in_child, row
from benchmarks.shards import SIZES, write_shards
from pyqlora.estimate import PARTS, Run, parts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def estimated(path: Path, batch: int, tokens: int, r: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by part, from the config alone, as `pyqlora estimate` computes them."""
    from pyqlora.cli.estimate import memory_of, shape_of

    shape = shape_of(str(path))
    _, _, _, in_use = memory_of("cpu", None)
    run = Run(batch, tokens, shape.adapter(r), dtype.itemsize)
    return parts(shape, "QLoRA", run) | {"Python and libraries": in_use}


def train(path: Path, batch: int, tokens: int, steps: int, r: int, dtype: torch.dtype) -> tuple[Meter, list[float]]:
    """Load, adapt, and take so many steps on one batch; the losses before each."""
    meter, losses = Meter(), []

    def say(part: Part) -> None:
        print(row(part), flush=True)

    with meter("load") as part:
        model = load(path, dtype)
    say(part)
    with meter("adapter") as part:
        model = pyqlora.prepare_model_for_kbit_training(model)
        config = pyqlora.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = pyqlora.get_peft_model(model, config).train()
        optimizer = pyqlora.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    say(part)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
    for step in range(1, steps + 1):
        with meter(f"step {step}: forward") as part:
            loss = pyqlora.causal_lm_loss(model, ids, input_ids=ids)
        say(part)
        with meter(f"step {step}: backward") as part:
            loss.backward()
        say(part)
        with meter(f"step {step}: optimizer") as part:
            optimizer.step()
            optimizer.zero_grad()
        say(part)
        losses.append(loss.item())
    return meter, losses


def load(path: Path, dtype: torch.dtype) -> Any:
    """The model in NF4 with double quantization."""
    config = pyqlora.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=SIZES, default="llama-3-8b")
    parser.add_argument("--directory", type=Path, help="where the shards are or shall be [a temporary one]")
    parser.add_argument("--layers", type=int, help="fewer or more than the model has")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of a sample")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the machine and every part here")
    arguments = parser.parse_args(given)
    hide_gpus()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.directory or Path(temporary) / arguments.model
        sizes = SIZES[arguments.model] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
        in_child(write_shards, path, sizes)
        return _report(path, arguments)


def _report(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    what = arguments.batch_size, arguments.tokens
    dtype = DTYPES[arguments.dtype]
    needs = estimated(path, *what, arguments.r, dtype)
    total = sum(needs.values())
    print("estimated: " + ", ".join(f"{part} {needs[part] / 1e6:,.0f}" for part in (*PARTS, "Python and libraries")))
    print(f"estimated peak: {total / 1e9:.2f} GB\n\n{HEADER}", flush=True)
    meter, losses = train(path, *what, arguments.steps, arguments.r, dtype)
    steps = len(losses)
    training = meter.parts[2:]
    peak = max(part.peak for part in training)
    print(f"\n{what[0]} x {what[1]} tokens, {arguments.threads} threads; losses {' '.join(f'{x:.4f}' for x in losses)}")
    wall, cpu = (sum(getattr(part, key) for part in training) / steps for key in ("wall_s", "cpu_s"))
    print(f"a step: {wall:.1f} s wall, {cpu:.1f} s CPU")
    print(
        f"peak: {meter.peak() / 1e9:.2f} GB; while training {peak / 1e9:.2f} GB, of which estimated {total / peak:.1%}"
    )
    result = {
        "estimated": needs,
        "parts": [vars(part) for part in meter.parts],
        "losses": losses,
        "peak": meter.peak(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
