"""`pyqlora doctor ADAPTER`: what an adapter is, whether it fits its base model, and whether it does anything."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMED = 3  # keys of a kind that a problem names


def examine(adapter: str, model: str | None) -> None:
    """Print the facts and the problems of an adapter.

    Args:
        adapter: its directory.
        model: the base model; None for the one that the adapter names.

    Raises:
        ValueError: there is no adapter, or it has problems.
    """
    from rich.console import Console

    import pyqlora
    from pyqlora.cli.screen import rows
    from pyqlora.finetune.quiet import quiet

    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = pyqlora.PeftConfig.from_pretrained(adapter)
        weights = pyqlora.load_peft_weights(adapter)
        skeleton, base = base_skeleton(config, model)
    size, problems = sizes(weights), value_problems(weights)
    expected = None
    if skeleton is None:
        problems += pair_problems(weights, config)
    else:
        expected, weights, found = fit_problems(skeleton, config, weights)
        problems += found
        base += ": every key and shape fits" if not found else ""
    problems += zero_problems(weights, expected)
    update = update_sizes(weights, config, skeleton)
    facts = [("adapter", described(config)), ("weights", size), ("update", update)]
    rows(Console(highlight=False, soft_wrap=True), [*facts, ("base", base), *(("problem", text) for text in problems)])
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{adapter}: {count} with this adapter, listed above")
    print("ok: the adapter is whole, finite and trained")


def described(config: Any) -> str:
    """The config in a line."""
    targets = config.target_modules
    if not isinstance(targets, str):
        names = [*(targets or ()), *(config.target_parameters or ())]
        targets = ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    parts = [f"LoRA, r {config.r}, alpha {config.lora_alpha} (scale {scale:.3g}) on {targets}"]
    parts += [name for name in ("use_dora", "use_rslora", "lora_bias") if getattr(config, name)]
    parts += [f"{name} {getattr(config, name)}" for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    if config.modules_to_save:
        parts.append(f"whole modules: {', '.join(config.modules_to_save)}")
    if config.task_type:
        parts.append(str(config.task_type))
    return "; ".join(parts)


def sizes(weights: dict[str, Tensor]) -> str:
    """Counts, dtypes and bytes in a line."""
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    count = sum(value.numel() for value in weights.values())
    megabytes = sum(value.nbytes for value in weights.values()) / 1e6
    return f"{len(weights)} tensors, {count:,} parameters, {', '.join(dtypes)}, {megabytes:.3g} MB"


def update_sizes(weights: dict[str, Tensor], config: Any, skeleton: Any) -> str:
    """The Frobenius norms of the updates scale·B·A, in a line; of a stack of experts, that of all its updates."""
    from pyqlora.inject import pattern_value
    from pyqlora.lora_layer import LoraLayer
    from pyqlora.variants import scaling_factor

    modules = skeleton.named_modules() if skeleton is not None else ()
    layers = {path: module for path, module in modules if isinstance(module, LoraLayer)}
    norms = {}
    for key, a in weights.items():
        path, found, _ = key.partition(".lora_A.weight")
        b = weights.get(f"{path}.lora_B.weight")
        if not found or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            continue
        name = path.removeprefix("base_model.model.")
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        r = pattern_value(config.rank_pattern, name, config.r)
        layer, scale = layers.get(name), scaling_factor(alpha, r, config.use_rslora)
        experts = 1
        if layer is not None:
            scale, experts = layer.scaling["default"], getattr(layer, "num_experts", 1)
        if len(a) % experts:
            continue
        a = a.double().view(experts, -1, a.shape[1])
        b = b.double().view(len(b), -1, experts).permute(2, 0, 1)
        square = ((a @ a.mT) * (b.mT @ b)).sum().clamp(min=0)  # tr(AᵀBᵀBA) without the product itself
        norms[name] = scale * float(square.sqrt())
    if not norms:
        return "no layers with matrices"
    largest = max(norms, key=norms.get)
    median = sorted(norms.values())[len(norms) // 2]
    return f"{len(norms)} layers, norm of B·A {median:.3g} in the middle, {norms[largest]:.3g} in {largest}"


def base_skeleton(config: Any, model: str | None) -> tuple[Any, str]:
    """The base model without weights, and what to say about it; None where its config is not on this machine."""
    import transformers

    from pyqlora.finetune.load import Source

    name = model or config.base_model_name_or_path
    if not name:
        return None, "the adapter names none; --model MODEL compares the keys with one"
    note = (
        f" (the adapter names {config.base_model_name_or_path})"
        if model not in (None, config.base_model_name_or_path)
        else ""
    )
    if Path(name).exists() or model:
        base_config = Source(name).config()
    else:
        try:
            base_config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            return None, f"{name} is not on this machine; --model MODEL compares the keys with one"
    kind = base_class(config)
    if kind is None:
        return None, f"{name}; which of its classes the adapter is for is not known, so the keys are not compared"
    if hasattr(base_config, "quantization_config"):
        del base_config.quantization_config
    with torch.device("meta"):
        skeleton = kind.from_config(base_config) if hasattr(kind, "from_config") else kind(base_config)
    return skeleton, f"{name}, {type(skeleton).__name__}{note}"


def base_class(config: Any) -> Any:
    """The class of transformers that the adapter is for; None where the config does not say."""
    import transformers

    from pyqlora import auto
    from pyqlora.tasks import TASK_MODELS

    if config.task_type is not None:
        wanted = TASK_MODELS[config.task_type]
        return next(
            getattr(transformers, kind.base_class)
            for kind in vars(auto).values()
            if getattr(kind, "peft_class", None) is wanted
        )
    mapping = config.auto_mapping or {}
    if str(mapping.get("parent_library", "")).partition(".")[0] == "transformers":
        return getattr(transformers, mapping["base_model_class"], None)
    return None


def fit_problems(
    skeleton: Any, config: Any, weights: dict[str, Tensor]
) -> tuple[set[str], dict[str, Tensor], list[str]]:
    """The keys that the model expects, the weights by those, and what is missing, too much or of another shape."""
    import pyqlora
    from pyqlora.adapter_files import PREFIX, file_keys
    from pyqlora.experts import stack_weights

    try:
        pyqlora.inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    except ValueError as error:
        return set(), weights, [f"the config does not fit the base model: {' '.join(str(error).split())}"]
    keys = file_keys(skeleton, "default")
    state = skeleton.state_dict()
    given = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    given = stack_weights(skeleton, given, {*keys, *state})
    own = {key: keys.get(key, key) for key in given}
    missing = [key for key in keys if key not in given]
    unexpected = [key for key in given if own[key] not in state]
    misshapen = [
        f"{key} {list(value.shape)}, in the model {list(state[own[key]].shape)}"
        for key, value in given.items()
        if own[key] in state and value.shape != state[own[key]].shape
    ]
    problems = [
        listed("missing, though the config asks for it", missing),
        listed("in the file, but the model has no place for it", unexpected),
        listed("of another shape than in the model", misshapen),
    ]
    weights = {PREFIX + key: value for key, value in given.items()}
    return {PREFIX + key for key in keys}, weights, [problem for problem in problems if problem]


def pair_problems(weights: dict[str, Tensor], config: Any) -> list[str]:
    """What does not fit together in the file itself: an A without its B, ranks that are not the config's."""
    ranks = {config.r, *config.rank_pattern.values()}
    alone, other = [], []
    for key, value in weights.items():
        for one, two, axis in (("lora_A.", "lora_B.", 0), ("lora_B.", "lora_A.", 1)):
            if one in key and key.endswith("weight"):
                if key.replace(one, two) not in weights:
                    alone.append(key)
                if value.dim() == 2 and value.shape[axis] not in ranks:
                    other.append(f"{key} {list(value.shape)}")
    problems = [
        listed("without its counterpart (A without B, or B without A)", alone),
        listed(f"of another rank than the config's {', '.join(map(str, sorted(ranks)))}", other),
    ]
    return [problem for problem in problems if problem]


def value_problems(weights: dict[str, Tensor]) -> list[str]:
    """Tensors that are not finite."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    problem = listed("with NaN or infinity", bad)
    return [problem] if problem else []


def zero_problems(weights: dict[str, Tensor], expected: set[str] | None) -> list[str]:
    """Layers whose B is zero once the adapter is loaded: in the file, or because the file lacks it."""
    keys = weights if expected is None else expected
    layers = [key for key in keys if ".lora_B." in key and key.endswith("weight")]
    zero = sorted(key for key in layers if key not in weights or not weights[key].any())
    if layers and len(zero) == len(layers):
        return [
            f"B is zero in all {len(layers)} layers, so the adapter changes nothing: it was never trained, or its "
            "weights were not saved or not found under their names"
        ]
    problem = listed(f"zero, so {len(zero)} of {len(layers)} layers change nothing", zero)
    return [problem] if problem else []


def listed(problem: str, keys: list[str]) -> str | None:
    """A problem with the number of keys that have it and the first of them; None if none has it."""
    if not keys:
        return None
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{problem} ({len(keys)}): {'; '.join(keys[:NAMED])}{more}"
