"""README.md beside a saved adapter: what the hub reads in its front matter, and how to use the adapter.

The front matter is YAML, of which only lines "key: value" and lists "key:" / "- item" are written or changed here;
what else a card holds stays as it is.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from pyqlora.config import PEFT_FORMAT_VERSION, PeftConfig, TaskType
from pyqlora.inject import model_config

if TYPE_CHECKING:
    from pyqlora.model import PeftModel

CARD_NAME = "README.md"

_BODY = """# {title}

A LoRA adapter (low-rank update of a frozen model, https://arxiv.org/abs/2106.09685) for {base}, in the format of PEFT:
the weights are in `adapter_model.safetensors`, the configuration in `adapter_config.json`.

## Adapter

| Setting | Value |
|---|---|
{settings}
| Trainable parameters | {trainable:,} of {total:,} |

## Use

The adapter is loaded onto the model that it was trained on:

```python
from pyqlora import PeftModel

model = PeftModel.from_pretrained(base_model, "PATH_OR_ID_OF_THIS_ADAPTER")
```

`from peft import PeftModel` does the same. `model.merge_and_unload()` adds the update to the base weights, which leaves
a plain model that runs and saves without either package; `model.disable_adapter()` is a context in which the base model
answers. Several adapters can be loaded side by side with `model.load_adapter(...)` and chosen with
`model.set_adapter(...)`.

## Training

Say here what the adapter was trained on and for, how it was evaluated, and where it should not be used.

### Framework versions

- PEFT {version}
"""


def write_model_card(model: PeftModel, config: PeftConfig, directory: str) -> None:
    """Write README.md, or add what the hub needs to the front matter of the one there."""
    path = os.path.join(directory, CARD_NAME)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            front, body = _split(file.read())
    else:
        front, body = [], _body(model, config)
    base = model.get_base_model()
    name = model_config(base).get("_name_or_path")
    tags = {"lora", *(getattr(base, "model_tags", None) or ())}
    if name is not None:
        tags.add(f"base_model:adapter:{name}")
        front = _with_value(front, "base_model", name or "''")
    if type(base).__module__.startswith("transformers."):
        tags.add("transformers")
    front = _with_value(front, "library_name", "peft")
    if config.task_type == TaskType.CAUSAL_LM and not any(line.startswith("pipeline_tag:") for line in front):
        front = _with_value(front, "pipeline_tag", "text-generation")
    front = _with_tags(front, tags)
    partial = path + ".tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.write("\n".join(["---", *front, "---", body.lstrip("\n")]))
    os.replace(partial, path)


def _body(model: PeftModel, config: PeftConfig) -> str:
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
    rows = []
    for field in shown:
        value = getattr(config, field)
        value = ", ".join(sorted(value)) if isinstance(value, (list, set)) else value
        rows.append(f"| {field} | {value} |")
    trainable, total = model.get_nb_trainable_parameters()
    base = config.base_model_name_or_path or f"a {type(model.get_base_model()).__name__}"
    return _BODY.format(
        title="LoRA adapter",
        base=base,
        settings="\n".join(rows),
        trainable=trainable,
        total=total,
        version=PEFT_FORMAT_VERSION,
    )


def _split(card: str) -> tuple[list[str], str]:
    """(lines of the front matter, the rest)."""
    found = re.match(r"---\n(.*?)\n?---\n?(.*)", card, re.DOTALL)
    return (found[1].split("\n"), found[2]) if found else ([], card)


def _with_value(front: list[str], key: str, value: str) -> list[str]:
    return [*(line for line in front if not line.startswith(f"{key}:")), f"{key}: {value}"]


def _with_tags(front: list[str], tags: set[str]) -> list[str]:
    """The list "tags:" with these added to those it has."""
    kept, inside = [], False
    for line in front:
        inside = line.startswith("tags:") or (inside and line.lstrip().startswith("- "))
        if not inside:
            kept.append(line)
        elif not line.startswith("tags:"):
            tags = tags | {line.lstrip()[2:].strip("'\"")}
    return [*kept, "tags:", *(f"- {tag}" for tag in sorted(tags))]
