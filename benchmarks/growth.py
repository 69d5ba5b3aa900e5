"""How a training step's time and memory grow with length, batch, rank and model size, each doubled four times.

`python -m benchmarks.growth [--plot benchmarks/growth.svg] [--json FILE]`

A small Llama in NF4 under LoRA on all linear layers, activations recomputed, PagedAdamW8bit, float32, one thread, every
point in a process of its own. Time is that of the fastest of nine steps: neighbours only ever add to it. Memory is the
peak of a step over what the process had before the model was made, with freed tensors returned to the system (as
`pyqlora finetune` does where memory is short). In a table, "doubling" is what the last doubling added, over what the
one before added: 2 where growth is linear, 4 where it is quadratic.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama

import pyqlora
from benchmarks.meter import Meter, hide_gpus, in_child, resident
from pyqlora.finetune.memory import return_freed_memory
from pyqlora.nn import Linear4bit

START = {"length": 64, "batch": 1, "rank": 8, "layers": 2}
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 256, 768, 8192, 4
DOUBLINGS, STEPS = 4, 9
HEADER = "| | " + " | ".join(f"×{2**n}" for n in range(DOUBLINGS + 1)) + " | doubling |\n|" + "---|" * (DOUBLINGS + 3)


def model_of(layers: int, rank: int) -> Any:
    """A Llama of random weights in NF4 under an adapter."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
        )
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            layer = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer.to("cpu"))
    model = pyqlora.prepare_model_for_kbit_training(model)
    config = pyqlora.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return pyqlora.get_peft_model(model, config).train()


def point(length: int, batch: int, rank: int, layers: int) -> dict[str, float]:
    """CPU seconds of the fastest step, and bytes at the highest moment of any."""
    torch.set_num_threads(1)
    return_freed_memory()
    before = resident()
    model = model_of(layers, rank)
    optimizer = pyqlora.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    meter = Meter()
    for _ in range(1 + STEPS):
        with meter("step"):
            pyqlora.causal_lm_loss(model, ids, input_ids=ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    steps = meter.parts[1:]
    return {"cpu_s": min(part.cpu_s for part in steps), "bytes": max(part.peak for part in steps) - before}


def measured() -> dict[str, list[dict[str, float]]]:
    """The points of every axis."""
    first = in_child(_point, START)
    axes = {}
    for axis, value in START.items():
        rest = [in_child(_point, START | {axis: value << n}) for n in range(1, DOUBLINGS + 1)]
        axes[axis] = [first, *rest]
    return axes


def _point(sizes: dict[str, int]) -> dict[str, float]:
    return point(**sizes)


def growth(values: list[float]) -> float:
    """What the last doubling added over what the one before did."""
    before, last = values[-2] - values[-3], values[-1] - values[-2]
    return last / before if before > 0 else float("nan")


def plot(axes: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Both quantities over every axis, logarithmically; the dashed line doubles with every doubling."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, (key, label, unit) in zip(panels, (("cpu_s", "CPU ms", 1e3), ("bytes", "MB", 1e-6)), strict=True):
        factors = [2**n for n in range(DOUBLINGS + 1)]
        for axis, points in axes.items():
            name = f"{axis}, from {START[axis]}"
            panel.plot(factors, [unit * values[key] for values in points], marker="o", label=name)
        lowest = min(unit * points[0][key] for points in axes.values())
        panel.plot(factors, [lowest * factor for factor in factors], "k--", linewidth=0.8, label="linear")
        panel.set(xscale="log", yscale="log", xlabel="times the smallest", title=f"a step, {label}")
        panel.set_xticks(factors, [f"×{factor}" for factor in factors])
        panel.minorticks_off()
    panels[0].legend(frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def main(given: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="draw into this .svg or .png")
    parser.add_argument("--json", type=Path, help="write every point here")
    arguments = parser.parse_args(given)
    hide_gpus()
    transformers.logging.set_verbosity_error()
    axes = measured()
    print(f"from {', '.join(f'{axis} {value}' for axis, value in START.items())}\n")
    for key, label, unit in (("cpu_s", "CPU ms a step", 1e3), ("bytes", "MB at most", 1e-6)):
        print(f"{label}\n\n{HEADER}")
        for axis, points in axes.items():
            values = [unit * values[key] for values in points]
            print(f"| {axis} | " + " | ".join(f"{value:.3g}" for value in values) + f" | {growth(values):.1f} |")
        print()
    if arguments.json:
        arguments.json.write_text(json.dumps({"start": START, "axes": axes}, indent=1))
    if arguments.plot:
        plot(axes, arguments.plot)
    return axes


if __name__ == "__main__":
    main()
