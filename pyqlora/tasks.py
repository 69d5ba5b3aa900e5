"""get_peft_model, and one PeftModel class for each task, whose forward names the inputs of that task's models."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from pyqlora.config import PeftConfig, TaskType
from pyqlora.lora_layer import LoraLayer
from pyqlora.model import PeftModel
from pyqlora.tuner import LoraModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        adapter_names=None,
        **kwargs,
    ):
        """The wrapped model's forward; with `adapter_names`, every row of the batch with its own adapter."""
        return super().forward(adapter_names=adapter_names, **_given(locals()), **kwargs)


class PeftModelForSequenceClassification(PeftModelForCausalLM):
    """A sequence classifier with adapters; its head is trained and saved whole."""

    modules_always_saved = ("classifier", "score")


class PeftModelForTokenClassification(PeftModelForCausalLM):
    """A token classifier with adapters; its head is trained and saved whole."""

    modules_always_saved = ("classifier", "score")


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        adapter_names=None,
        **kwargs,
    ):
        """The wrapped model's forward; with `adapter_names`, every row of the batch with its own adapter."""
        return super().forward(adapter_names=adapter_names, **_given(locals()), **kwargs)

    def generate(self, **kwargs):
        """The wrapped model's generate, whose inputs are given by name."""
        return super().generate(**kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head is trained and saved whole."""

    modules_always_saved = ("qa_outputs",)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        adapter_names=None,
        **kwargs,
    ):
        """The wrapped model's forward; with `adapter_names`, every row of the batch with its own adapter."""
        return super().forward(adapter_names=adapter_names, **_given(locals()), **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model that returns embeddings or features, with adapters."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        adapter_names=None,
        **kwargs,
    ):
        """The wrapped model's forward; with `adapter_names`, every row of the batch with its own adapter."""
        return super().forward(adapter_names=adapter_names, **_given(locals()), **kwargs)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The named inputs that were passed: a wrapped model need not know the others."""
    own = ("self", "kwargs", "adapter_names", "__class__")
    return {name: value for name, value in arguments.items() if value is not None and name not in own}


TASK_MODELS: dict[Any, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put LoRA layers into a model without wrapping it, and return it.

    Args:
        peft_config: which layers, what rank, …
        model: any torch module, changed in place.
        adapter_name: what to call the adapter.
        low_cpu_mem_usage: make the adapter on the meta device, for weights that are loaded next.
        state_dict: an adapter's weights, whose keys (not values) then say which layers to adapt.

    Raises:
        ValueError: nothing to adapt.
    """
    return LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict).model


MIXED_MODEL = PeftModel  # what mixed=True makes


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put an adapter onto a model, which is changed in place, and freeze all else.

    Args:
        model: any torch module; a quantized one after `prepare_model_for_kbit_training`.
        peft_config: which layers, what rank, …; its task_type chooses the class of the result.
        adapter_name: what to call the adapter.
        mixed: in PEFT, that adapters of several methods may follow; here all are LoRA, in a PeftModel like any other.
        autocast_adapter_dtype: keep the adapter in float32 where the base model is in half precision.
        revision: the base model's revision, noted in the config.
        low_cpu_mem_usage: make the adapter on the meta device, for weights that are loaded next.

    Raises:
        ValueError: the config fits no module of the model (the message names the nearest).
        TypeError: the config is no LoraConfig.
    """
    if not hasattr(peft_config, "peft_type"):
        raise TypeError(f"get_peft_model: expected a LoraConfig, got {type(peft_config).__name__}: {peft_config!r}")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    old_name = peft_config.base_model_name_or_path
    peft_config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    if old_name is not None and old_name != peft_config.base_model_name_or_path:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to "
            f"'{peft_config.base_model_name_or_path}'. Please ensure that the correct base model is loaded when "
            "loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    kind = MIXED_MODEL if mixed else TASK_MODELS.get(peft_config.task_type, PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
