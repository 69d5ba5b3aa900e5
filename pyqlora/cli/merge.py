"""`pyqlora merge`: an adapter added to its base model for good, as a model that needs no adapter and no pyqlora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

BASES = ("dequantized", "original")
GGUF_TYPES = ("f16", "q8_0")
WIDTH = len("written")


def merge(
    model: Annotated[str, typer.Argument(help="The base model: Hugging Face directory or id, or a .gguf file.")],
    adapter: Annotated[str, typer.Argument(help="Directory of the adapter.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Directory to write to; it must not exist or be empty.")],
    base: Annotated[
        str,
        typer.Option(help="dequantized: the 4-bit weights that the adapter was trained on; original: the 16-bit ones."),
    ] = "dequantized",
    gguf: Annotated[str | None, typer.Option(help="Write a .gguf file of this type too: f16 or q8_0.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge ADAPTER into MODEL and write a plain 16-bit model, with a check of what the merge changed."""
    for option, value, allowed in (("--base", base, BASES), ("--gguf", gguf, (None, *GGUF_TYPES))):
        if value not in allowed:
            expected = " or ".join(filter(None, allowed))
            raise ValueError(f"{option} {value!r} is not known, expected {expected}")
    directory = Path(out)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"-o {out}: exists and is not an empty directory; choose another -o, or remove it first")
    from rich.console import Console

    from pyqlora.cli.screen import rows
    from pyqlora.finetune.load import Source
    from pyqlora.finetune.quiet import quiet

    quiet()
    source = Source(model)
    tokenizer = tokenizer_of(adapter, source)
    if gguf is not None:
        from pyqlora.integrations.gguf_write import check

        check(source.config(), tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    merged, shown = merged_model(source, adapter, base, tokenizer)
    rows(console, shown, WIDTH)
    files = write(merged, tokenizer, directory, gguf)
    rows(console, [("written", f"{out}: {', '.join(files)}")], WIDTH)


def tokenizer_of(adapter: str, source: Any) -> Any:
    """The tokenizer beside the adapter, which may have a chat template of its own, else the model's."""
    if (Path(adapter) / "tokenizer_config.json").is_file():
        from pyqlora.finetune.load import Source

        return Source.tokenizer_in(adapter)
    return source.tokenizer()


def merged_model(source: Any, adapter: str, base: str, tokenizer: Any) -> tuple[Any, list[tuple[str, str]]]:
    """The merged model in 16 bits, and what to say about it."""
    from pyqlora import dense, merge_check
    from pyqlora.finetune.load import load_lora, pick_device
    from pyqlora.unload import unload, untie

    device, trained_dtype = pick_device()
    dtype = source.dtype()
    original = source.original(device, dtype) if base == "original" else None
    tuned = load_lora(source.base(device, trained_dtype), adapter)
    trained = merge_check.logits(tuned, tokenizer)
    if original is not None:
        tuned = load_lora(original, adapter)
    for module in tuned.modules():
        if dense.is_4bit(module):
            dense.quant_state(module).dtype = dtype  # in which the merged weight is kept
    before = trained if base == "dequantized" else merge_check.logits(tuned, tokenizer)
    count = sum(1 for _ in tuned.base_model.lora_layers())
    untie(tuned.get_base_model())
    merged = unload(tuned.get_base_model(), merge=True, safe_merge=True).to(dtype)
    after = merge_check.logits(merged, tokenizer)
    shown = [
        ("base", f"{source.model}, {base} weights in {str(dtype).removeprefix('torch.')}"),
        ("adapter", f"{adapter}, merged into {count} layers"),
        ("check", f"against the unmerged model: {merge_check.compare(before, after)}"),
    ]
    if base == "original":
        shown.append(("", f"against the 4-bit model with the adapter: {merge_check.compare(trained, after)}"))
    return merged, shown


def write(merged: Any, tokenizer: Any, out: Path, gguf: str | None) -> list[str]:
    """Write the model and its tokenizer, all or nothing; returns the names of the files."""
    from pyqlora.finetune.files import whole_directory

    with whole_directory(out) as directory:
        merged.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if gguf is not None:
            from pyqlora.integrations.gguf_write import write_model

            write_model(merged, tokenizer, directory / f"{out.name}-{gguf}.gguf", gguf)
        return sorted(file.name for file in directory.iterdir())
