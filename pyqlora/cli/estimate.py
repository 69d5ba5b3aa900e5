"""`pyqlora estimate`: what fine-tuning a model needs in memory, and what fits, from the model's config alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

FIRST_STEP = 14_000_000  # bytes of its libraries and buffers that a process first touches when it trains: measured


def estimate(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or id, its config.json, or a .gguf file.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 4,
    r: Annotated[int, typer.Option("--r", help="Rank of the adapter, on all linear layers.")] = 16,
    optim: Annotated[str, typer.Option(help="paged_adamw_8bit, paged_adamw_32bit, adamw_torch.")] = "paged_adamw_8bit",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or the GB of a GPU, such as 24 [this one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [as finetune on that device].")] = None,
    checkpointing: Annotated[str, typer.Option(help="Activations recomputed: full, selective or none.")] = "full",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print the memory that full fine-tuning, LoRA and QLoRA of MODEL need, part by part, and what fits."""
    from rich.console import Console
    from rich.table import Table

    from pyqlora.estimate import CHECKPOINTING, METHODS, PARTS, STATE_BYTES, Run, largest_batch, longest, parts
    from pyqlora.finetune.plan import size

    for name, value in (("max-length", max_length), ("batch-size", batch_size), ("r", r)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if optim not in STATE_BYTES:
        raise ValueError(f"--optim {optim!r} is not known, expected one of {', '.join(STATE_BYTES)}")
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"--checkpointing {checkpointing!r} is not known, expected {', '.join(CHECKPOINTING)}")
    shape = shape_of(model)
    place, computed, capacity, in_use = memory_of(device, dtype)
    run = Run(batch_size, max_length, shape.adapter(r), computed.itemsize, optim, checkpointing, on_cpu=place == "CPU")

    print(f"{model}: {shape.parameters / 1e6:,.1f} M parameters, {shape.in_linears / 1e6:,.1f} M in linear layers")
    print(f"adapter of rank {r} on all of these: {run.trained / 1e6:,.1f} M parameters, {optim}")
    dtype = str(computed).removeprefix("torch.")
    print(f"{batch_size} x {max_length} tokens, computing in {dtype}, checkpointing: {checkpointing}")
    print(f"{place}: {size(capacity)}\n")
    table = Table("", *METHODS, box=None, pad_edge=False, padding=(0, 3))
    needs = [parts(shape, method, run) for method in METHODS]
    for part in PARTS:
        table.add_row(part, *(size(need[part]) for need in needs))
    if in_use:
        table.add_row("Python and libraries", *[size(in_use)] * len(METHODS))
    totals = [sum(need.values()) + in_use for need in needs]
    table.add_row("total", *map(size, totals))
    table.add_row("fits", *("yes" if need <= capacity else "no" for need in totals))
    room = capacity - in_use
    batches = [largest_batch(shape, method, run, room) for method in METHODS]
    table.add_row(f"largest batch of {max_length} tokens", *map(str, batches))
    table.add_row("longest single sample, tokens", *(f"{longest(shape, method, run, room):,}" for method in METHODS))
    Console(highlight=False, width=100).print(table)


def memory_of(device: str | None, dtype: str | None) -> tuple[str, Any, float, int]:
    """The device's name, the dtype computed in, the bytes a run may have, and how many of these a process takes.

    On a CPU that is this process, with what it has imported for the model, and what torch takes in its first step.

    Raises:
        ValueError: there is no such device or dtype.
    """
    import torch

    from pyqlora.finetune.load import pick_device
    from pyqlora.finetune.memory import free_bytes, used_bytes

    here, computed = pick_device()
    if device is None:
        device = here.type
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    if device == "cpu":
        import transformers.modeling_utils  # noqa: F401 - so that it counts

        computed, used = torch.float32, used_bytes(torch.device("cpu"))
        name, capacity, in_use = "CPU", free_bytes(torch.device("cpu")) + used, used + FIRST_STEP
    elif device == "cuda" and torch.cuda.is_available():
        name, capacity, in_use = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, 0
    elif re.fullmatch(r"\d+(\.\d+)?(gb)?", device.lower()) and float(device.lower().removesuffix("gb")) > 0:
        gigabytes = float(device.lower().removesuffix("gb"))
        name, capacity, in_use = f"GPU of {gigabytes:g} GB", gigabytes * 2**30, 0
        computed = torch.bfloat16
    else:
        here_too = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"--device {device!r}: expected {here_too}, or the GB of a GPU, such as 24")
    return name, getattr(torch, dtype) if dtype else computed, capacity, in_use


def shape_of(model: str) -> Any:
    """The sizes of a model, from its config.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or it is not one that can be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pyqlora.estimate import Shape
    from pyqlora.finetune.load import Source
    from pyqlora.finetune.quiet import quiet

    quiet()
    if Path(model).suffix == ".json":
        try:
            config = AutoConfig.from_pretrained(Path(model).parent, _configuration_file=Path(model).name)
        except Exception as error:
            raise ValueError(f"{model}: the model's config cannot be loaded: {error}") from error
    else:
        config = Source(model).config()
    try:
        with torch.device("meta"):
            return Shape.of(AutoModelForCausalLM.from_config(config))
    except Exception as error:
        raise ValueError(f"{model}: {type(config).__name__} describes no causal language model: {error}") from error
