"""AutoPeftModel…: the base model that an adapter names, loaded with the adapter on it. Needs transformers."""

from __future__ import annotations

import importlib
from typing import Any

from pyqlora import tasks
from pyqlora.adapter_files import find_file
from pyqlora.config import PeftConfig
from pyqlora.model import PeftModel

# A config may name the base model's class by module and name; importing just anything would run its code.
IMPORTABLE = ("diffusers", "lerobot", "megatron-core", "transformers")


class AutoPeftModel:
    """For adapters without a task type: the base model's class is the one that the config names."""

    base_class: str | None = None  # the name of a class of transformers
    peft_class: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model, then the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's directory or repository.
            adapter_name: what to call the adapter.
            is_trainable: train it further.
            config: a config to use for the adapter instead of the stored one.
            revision: the adapter's revision on the hub.
            import_allowlist: packages from which the config may name the base model's class.
            kwargs: for the base model's from_pretrained and for the hub.

        Raises:
            ValueError: the adapter is of another task, or names no class or one from elsewhere.
        """
        stored = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        base_class = cls._base_class_of(stored, IMPORTABLE if import_allowlist is None else import_allowlist)
        base = base_class.from_pretrained(stored.base_model_name_or_path, revision=stored.revision, **kwargs)
        hub = {"revision": revision, "token": kwargs.get("token")}
        if find_file(pretrained_model_name_or_path, "tokenizer_config.json", **hub):
            transformers = importlib.import_module("transformers")
            remote = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
            tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub, **remote)
            if hasattr(base, "get_input_embeddings") and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(len(tokenizer))
        return cls.peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class_of(cls, config: PeftConfig, importable: tuple[str, ...] | list[str]) -> Any:
        if config.task_type is not None:
            if cls.base_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = tasks.TASK_MODELS[config.task_type]
            if cls.peft_class is not expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected.__name__}, but you have asked for: "
                    f"{cls.peft_class.__name__} make sure that you are loading the correct model for your task type."
                )
            return getattr(importlib.import_module("transformers"), cls.base_class)
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library = config.auto_mapping["parent_library"]
        if not any(library == name or library.startswith(f"{name}.") for name in importable):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For task_type CAUSAL_LM."""

    base_class, peft_class = "AutoModelForCausalLM", tasks.PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For task_type SEQ_2_SEQ_LM."""

    base_class, peft_class = "AutoModelForSeq2SeqLM", tasks.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For task_type SEQ_CLS."""

    base_class, peft_class = "AutoModelForSequenceClassification", tasks.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For task_type TOKEN_CLS."""

    base_class, peft_class = "AutoModelForTokenClassification", tasks.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For task_type QUESTION_ANS."""

    base_class, peft_class = "AutoModelForQuestionAnswering", tasks.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For task_type FEATURE_EXTRACTION."""

    base_class, peft_class = "AutoModel", tasks.PeftModelForFeatureExtraction
