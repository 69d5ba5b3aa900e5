"""How transformers' own `model.load_adapter` finds an adapter's keys in the model: it asks PEFT for this."""

from __future__ import annotations

from typing import Any

from pyqlora.experts import stack_factors, stacks


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """What brings an adapter file's weights to the model, in transformers' terms.

    Args:
        weight_conversions: those of the base model's own weights. Its renamings are kept, since adapters have the same
            paths; where it stacks experts the factors of all of them become those of the stack, the outermost of the
            layer's stacks last. Whatever else joins several weights into one has no meaning for the factors of each.
        adapter_name: goes behind `lora_A` and the like.
        peft_config: accepted as in PEFT.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    known = stacks(weight_conversions or [])
    converters = []
    for stack in known:
        same = [other.parameter for other in known if other.container == stack.container]
        wrapped = ".base_layer" * (len(same) - 1 - same.index(stack.parameter))
        for factor in "AB":
            sources = [f"{stack.container}.*.{name}.lora_{factor}.{adapter_name}.weight" for name in stack.projections]
            target = f"{stack.container}{wrapped}.lora_{factor}.{adapter_name}.weight"
            converters.append(WeightConverter(sources, target, [_stacking(left=factor == "B")]))
    return [
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
        WeightRenaming(rf"(lora_magnitude_vector\.{adapter_name})$", r"\1.weight"),  # stored without
        *(conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)),
        *converters,
    ]


def _stacking(left: bool) -> Any:
    """The operation of transformers that makes one factor of a stack from those of its projections."""
    from transformers.core_model_loading import ConversionOps

    class StackFactors(ConversionOps):
        """`stack_factors` on what transformers has collected, experts in order."""

        def convert(self, input_dict: dict[str, list[Any]], source_patterns: list[str], **kwargs: Any) -> dict:
            parts = [input_dict[pattern] for pattern in source_patterns]
            return {kwargs["full_layer_name"]: stack_factors(parts, left)}

    return StackFactors()
