"""Adapter configuration: LoraConfig with PEFT's fields, and adapter_config.json in PEFT's format."""

from __future__ import annotations

import enum
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

CONFIG_NAME = "adapter_config.json"
PEFT_FORMAT_VERSION = "0.21.2"  # the release of PEFT whose file format is written


class PeftType(str, enum.Enum):
    """The adapter methods of pyqlora; PEFT has more, which a config file may name but which are refused here."""

    LORA = "LORA"


class TaskType(str, enum.Enum):
    """What the base model computes; chooses the PeftModel class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every adapter's config holds, and how it is written to and read from adapter_config.json.

    Args:
        task_type: a TaskType or its name; None for a model without a task class.
        base_model_name_or_path: where the base model was loaded from.
        revision: its revision on the hub.
        inference_mode: True if the adapter is not to be trained; files are always written with True.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self):
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {', '.join(tasks)}."
            )
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    @staticmethod
    def _get_peft_version() -> str:
        return PEFT_FORMAT_VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Always False: pyqlora has no prompt methods; transformers' Trainer asks."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False, as is_prompt_learning."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON except for sets."""
        return asdict(self)

    def save_pretrained(self, save_directory: str, *, auto_mapping_dict: dict | None = None, **_: Any) -> None:
        """Write `adapter_config.json` into the directory, which is made if missing.

        Raises:
            ValueError: the path is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        values = {key: sorted(v) if isinstance(v, set) else v for key, v in self.to_dict().items()}
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        path = os.path.join(save_directory, CONFIG_NAME)
        partial = path + ".tmp"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2, sort_keys=True)
        os.replace(partial, path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read the config of an adapter directory, or of a repository on the hub if huggingface_hub is installed.

        `kwargs` that huggingface_hub knows (revision, token, cache_dir, …) go to it; values in the file win over the
        rest. Keys in the file that pyqlora does not know are ignored with one warning when they are null, false or
        empty.

        Raises:
            ValueError: no such file, a method other than LoRA, or an unknown key that is active.
            TypeError: the file is no adapter's config.
        """
        from pyqlora.adapter_files import find_file
        from pyqlora.hub import reason_to_lack

        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **kwargs)
        if path is None:
            name = str(pretrained_model_name_or_path)
            place = os.path.join(name, subfolder) if subfolder else name
            where = "" if os.path.isdir(place) else ": there is no such directory"
            if not os.path.isdir(name) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):  # it may be a repository's
                where += f", and {reason_to_lack(name, CONFIG_NAME, **kwargs)}"
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{place}'{where}")
        values = cls.from_json_file(path)
        own = {f.name for f in fields(LoraConfig)}
        return cls.from_peft_type(**{**{k: v for k, v in kwargs.items() if k in own}, **values})

    @classmethod
    def from_json_file(cls, path_json_file: str, **_: Any) -> dict[str, Any]:
        """The file's values. `runtime_config`, which is never part of a file, is dropped with a warning."""
        with open(path_json_file, encoding="utf-8") as file:
            values = json.load(file)
        if "runtime_config" in values:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
            del values["runtime_config"]
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any):
        """A config of the class that `peft_type` names (or of this class without it) from keyword values."""
        kind = kwargs.get("peft_type")
        if kind is not None and kind != PeftType.LORA:
            raise ValueError(f"pyqlora adapts models with LoRA only; this config asks for peft_type={kind!s}")
        target = cls if kind is None else LoraConfig
        known = {f.name for f in fields(target) if f.init}
        unknown = sorted(set(kwargs) - known)
        active = {key: kwargs[key] for key in unknown if kwargs[key]}
        if active and kind is None:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if active:
            cls._meet_unknown(target, active)
            unknown = [key for key in unknown if key not in active]
        if unknown:
            warnings.warn(
                f"ignoring unknown but inactive keys of the adapter config: {', '.join(unknown)}", stacklevel=3
            )
        return target(**{key: value for key, value in kwargs.items() if key in known})

    @staticmethod
    def _meet_unknown(target: type, active: dict[str, Any]) -> None:
        """Refuse settings that the config class does not know and that are neither null, false nor empty."""
        raise ValueError(
            f"adapter config with {', '.join(f'{key}={value!r}' for key, value in active.items())}: pyqlora does not "
            f"know {'this setting' if len(active) == 1 else 'these settings'}, and ignoring it would change the model"
        )


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config with a dict's values, of the class that its `peft_type` names.

    Raises:
        ValueError: a method other than LoRA, or an active setting that is not known.
    """
    return PeftConfig.from_peft_type(**config_dict)


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never written to a file."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ initialisation (Li et al. 2023, arXiv:2310.08659): bits of the quantized base, alternating iterations."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA initialisation from data (Paischer et al. 2024, arXiv:2410.07170); see pyqlora.eva.

    Args:
        rho: a layer's rank may grow to rho · r where its inputs need more components than others'.
        tau: cosine similarity to the step before at which a component has settled.
        use_label_mask: leave out tokens whose label is `label_mask_value`.
        whiten: divide components by the root of their singular values.
        adjust_scaling_factors: keep alpha / r as it was where the rank has changed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self):
        if self.rho < 1.0:
            raise ValueError("`rho` must be >= 1.0")
        if self.tau < 0.0 or self.tau > 1.0:
            raise ValueError("`tau` must be between 0.0 and 1.0.")


# PEFT's settings for methods that pyqlora does not have: field -> (the inactive value, what to call the method).
UNSUPPORTED = {
    "megatron_config": (None, "Megatron layers"),
    "corda_config": (None, "CorDA"),
    "lora_ga_config": (None, "LoRA-GA"),
    "velora_config": (None, "VeLoRA"),
    "alora_invocation_tokens": (None, "Activated LoRA"),
    "use_qalora": (False, "QALoRA"),
    "monteclora_config": (None, "Monte-Carlo LoRA"),
    "use_bdlora": (None, "BD-LoRA"),
    "arrow_config": (None, "Arrow"),
    "kasa_config": (None, "KaSA"),
}
UNSUPPORTED_INITS = {"corda": "CorDA", "lora_ga": "LoRA-GA", "mica": "MiCA"}


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685), field for field as in PEFT 0.21.

    Args:
        r: rank of the update B·A.
        target_modules: which modules get an adapter: a list of names (a module matches by its full name or the end of
            it after a dot), a regular expression for the full name, or "all-linear" for every linear layer but the
            output head. None picks the usual layers of a known model type.
        exclude_modules: modules to leave out, a list or a regular expression.
        lora_alpha: the update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: probability of dropping an input element of the adapter.
        fan_in_fan_out: True if the base stores its weight as [in, out], as GPT-2's Conv1D does.
        bias: which biases of the base to train and save: "none", "all" or "lora_only".
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        modules_to_save: further modules to train and save whole, e.g. a classifier head.
        init_lora_weights: True (Kaiming A, zero B), False (both random), "gaussian", "orthogonal", "pissa",
            "pissa_niter_<n>", "olora", "loftq" or "eva".
        layers_to_transform: the layer indices to adapt; None for all. `layers_pattern` names the list of layers.
        rank_pattern, alpha_pattern: rank or alpha by module name or pattern, where they differ from `r`, `lora_alpha`.
        trainable_token_indices: embedding rows to train: a list, or {embedding's name: list}.
        loftq_config: a LoftQConfig or dict for init_lora_weights="loftq".
        use_dora: weight-decomposed update (Liu et al. 2024, arXiv:2402.09353).
        layer_replication: [start, end) ranges of layers of which the adapted model is stacked, sharing base weights.
        lora_bias: give B a bias.
        target_parameters: names of single parameters to adapt, [out, in] or [experts, out, in], as the stacked experts
            of a mixture; matched by the end of the full name.
        ensure_weight_tying: adapt tied layers with one shared adapter.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, without `runtime_config`."""
        values = super().to_dict()
        values.pop("runtime_config")
        return values

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        for name, (inactive, method) in UNSUPPORTED.items():
            if getattr(self, name) not in (inactive, [], {}):
                raise ValueError(f"LoraConfig({name}=…): pyqlora does not have {method}; leave {name} at {inactive}")
        if self.init_lora_weights in UNSUPPORTED_INITS:
            method = UNSUPPORTED_INITS[self.init_lora_weights]
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r}: pyqlora does not have {method}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._custom_modules: dict[type, type] = {}
        self._check_layer_selection()
        self._check_initialisation()

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Adapt kinds of base layers by the program's own layers: {kind: subclass of nn.Module and LoraLayer}.

        Files do not hold it: name them again in the config that `PeftModel.from_pretrained(…, config=config)` gets.
        """
        self._custom_modules.update(mapping)

    def _check_layer_selection(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def _check_initialisation(self) -> None:
        if isinstance(self.eva_config, dict):
            self.eva_config = EvaConfig(**self.eva_config)
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = asdict(self.loftq_config)
        if self.init_lora_weights == "loftq":
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn(
                "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.", stacklevel=4
            )
        if self.init_lora_weights == "eva" and self.eva_config is None:
            warnings.warn(
                "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.",
                stacklevel=4,
            )
            self.eva_config = EvaConfig()
        elif self.init_lora_weights != "eva" and self.eva_config is not None:
            warnings.warn(
                "`eva_config` specified but will be ignored when `init_lora_weights` is not 'eva'.", stacklevel=4
            )
        splits = str(self.init_lora_weights).startswith(("pissa", "olora"))
        if splits and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                f"base weights ({self.init_lora_weights}): PEFT cannot convert such an adapter, pyqlora can.",
                stacklevel=4,
            )
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
