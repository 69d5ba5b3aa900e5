"""`pyqlora generate`: complete a prompt with a model that was fine-tuned here."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    adapter: Annotated[str, typer.Argument(help="Directory that `pyqlora finetune` wrote.")],
    prompt: Annotated[str, typer.Argument(help="Text to complete.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the completion at most.")] = 128,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Complete PROMPT greedily with the model in ADAPTER."""
    import json
    from pathlib import Path

    from transformers import AutoTokenizer

    import pyqlora
    from pyqlora.finetune.evaluate import complete
    from pyqlora.finetune.load import Source, pick_device
    from pyqlora.finetune.quiet import quiet

    quiet()
    config = Path(adapter) / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{adapter}: no adapter_config.json there, expected what `pyqlora finetune` wrote")
    source = Source(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = pyqlora.PeftModel.from_pretrained(source.base(*pick_device()), adapter)
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    print(complete(model, [ids], tokenizer, max_new_tokens)[0].strip())
