"""The plan of a run, as lines to read before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyqlora.finetune.encode import IGNORED, Encoded, Encoding
from pyqlora.finetune.memory import Estimate
from pyqlora.finetune.options import Options

SAMPLE_TOKENS = 120  # of the sample that is shown
HOW = {
    "none": "keeping activations",
    "selective": "keeping the outputs of linear layers and attention, recomputing other activations",
    "full": "recomputing activations",
}


@dataclass(frozen=True)
class Plan:
    """What is printed before the first step: labelled lines, and one sample as (text, trained) pieces."""

    rows: list[tuple[str, str]]
    sample: list[tuple[str, bool]]
    warnings: list[str]


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """The device, its kernels and the type computed in."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, computing in {name}"
    from pyqlora import _C

    return f"CPU, {torch.get_num_threads()} threads, {_C.cpu.isa()} kernels, computing in {name}"


def make_plan(
    options: Options,
    model: Any,
    shape: str,
    encoding: Encoding,
    train: list[Encoded],
    held_out: list[Encoded],
    steps: int,
    estimate: Estimate,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Any,
) -> Plan:
    """Everything a user may want to check before the first step."""
    from pyqlora.nn import Linear4bit

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    in_4bit = sum(module.in_features * module.out_features for module in quantized)
    rest = {p.data_ptr(): p.numel() for p in model.parameters() if not p.requires_grad}
    for module in quantized:
        rest.pop(module.weight.data_ptr(), None)
    total = in_4bit + sum(rest.values())
    per_step = options.batch_size * options.grad_accum
    trained = sum(sample.trained for sample in train)
    tokens = sum(len(sample.ids) for sample in train)
    kept = f"{encoding.read} read ({shape}), {len(encoding.samples)} samples kept"
    kept += "".join(f", {count} dropped {reason}" for reason, count in encoding.dropped.items())
    if encoding.truncated:
        kept += f", {encoding.truncated} cut to {options.max_length} tokens"
    epochs = steps * per_step / len(train)
    how = HOW[estimate.checkpointing]
    added = ", ".join(f"{size(count)} {part}" for part, count in estimate.added.items())
    held = f"{len(held_out)} held out"
    if options.val and not held_out and len(train) > 1:
        held += ", for every sample occurs more than once"
    rows = [
        ("device", describe_device(device, dtype)),
        ("model", f"{Path(options.model).name}: {total / 1e6:.1f} M parameters, {in_4bit / 1e6:.1f} M of them in NF4"),
        ("adapter", f"LoRA r={options.r} alpha={options.alpha} on {options.targets}: {trainable:,} trained parameters"),
        (
            "memory",
            f"{size(estimate.total)} estimated: {size(estimate.now)} in use ({size(estimate.model)} of it the model), "
            f"{added}, {how}; {size(estimate.free)} free",
        ),
        ("data", f"{options.data}: {kept}"),
        ("split", f"{len(train)} samples to train, {tokens:,} tokens, {trained:,} trained; {held}"),
        ("run", f"{steps} steps of {per_step} samples ({epochs:.1f} epochs), lr {options.lr:g}, seed {options.seed}"),
    ]
    warnings = []
    if sum(estimate.added.values()) > estimate.free:
        warnings.append("this may not fit in memory: lower --batch-size (and raise --grad-accum) or --max-length")
    return Plan(rows, mark(train[0], tokenizer), warnings)


def mark(sample: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The sample's text in pieces, each with whether its tokens are trained."""
    pieces: list[tuple[list[int], bool]] = []
    for index, token in enumerate(sample.ids[:SAMPLE_TOKENS]):
        trained = index > 0 and sample.labels[index] != IGNORED
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    marked = [(tokenizer.decode(ids), trained) for ids, trained in pieces]
    return [*marked, (" …", False)] if len(sample.ids) > SAMPLE_TOKENS else marked
