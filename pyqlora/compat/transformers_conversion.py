"""How transformers' own `model.load_adapter` finds an adapter's keys in the model: it asks PEFT for this."""

from __future__ import annotations

from typing import Any


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Renamings from an adapter file's keys to the model's, in transformers' terms.

    Args:
        weight_conversions: those of the base model's own keys; its renamings are kept, since adapters have the same
            paths. What joins several weights into one has no meaning for the factors of each and is left out.
        adapter_name: goes behind `lora_A` and the like.
        peft_config: accepted as in PEFT.
    """
    from transformers.core_model_loading import WeightRenaming

    return [
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
        WeightRenaming(rf"(lora_magnitude_vector\.{adapter_name})$", r"\1.weight"),  # stored without
        *(conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)),
    ]
