"""transformers' Trainer with pyqlora's PeftModel and optimizers.

The Trainer saves adapters alone, resumes from them and trains a quantized model only if it finds a PeftModel, for which
it asks PEFT; and it knows bitsandbytes' optimizers by name (`optim="paged_adamw_8bit"`). `register()` answers both
questions in this process: the names by which the Trainer asks for PEFT's classes then include pyqlora's, whether PEFT
is installed or not, and bitsandbytes' optimizer names give pyqlora's. And the Trainer's training steps, which want the
loss alone, compute it without holding all logits (`pyqlora.integrations.causal_lm`). `unregister()` takes it back.
Putting an adapter on one of transformers' models to train it calls `register()`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from transformers import trainer, trainer_optimizer, trainer_utils

from pyqlora import optim
from pyqlora.integrations.causal_lm import chunked
from pyqlora.model import PeftModel

_ABSENT = object()
_compute_loss = trainer.Trainer.compute_loss


def register() -> None:
    """Let the Trainer treat pyqlora's PeftModel as one, and use pyqlora's optimizers by bitsandbytes' names."""
    if _before:
        return
    models: tuple[type, ...] = (PeftModel,)
    mixed: tuple[type, ...] = ()
    if importlib.util.find_spec("peft"):
        import peft

        models, mixed = (PeftModel, peft.PeftModel), (peft.PeftMixedModel,)
    for module in (trainer, trainer_utils):
        _replace(module.__dict__, "is_peft_available", lambda *args: True)
        _replace(module.__dict__, "PeftModel", models)  # asked by isinstance alone, which takes tuples
    _replace(trainer_utils.__dict__, "PeftMixedModel", mixed)
    for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS:
        _replace(trainer_optimizer._OPTIMIZER_HANDLERS, name, optimizer)
    trainer.Trainer.compute_loss = chunked(_compute_loss)


def unregister() -> None:
    """Undo `register()`."""
    trainer.Trainer.compute_loss = _compute_loss
    while _before:
        names, name, value = _before.pop()
        if value is _ABSENT:
            del names[name]
        else:
            names[name] = value


def optimizer(ctx: trainer_optimizer.OptimizerContext) -> tuple[type, dict[str, Any]]:
    """The optimizer class and its arguments for a name of bitsandbytes, as the Trainer's table of optimizers asks."""
    name, extra, args = ctx.args.optim.value, ctx.optim_args, ctx.args
    bits = 8 if "8bit" in name else 32
    kwargs = {**ctx.optimizer_kwargs, "optim_bits": bits}
    if "rmsprop" in name:
        return optim.RMSprop, kwargs | extra
    kwargs["is_paged"] = "paged" in name
    if bits == 8 and ctx.model is not None:
        _keep_embeddings_in_32_bits(ctx.model)
    if "lion" in name:
        return optim.Lion, kwargs | {"betas": (args.adam_beta1, args.adam_beta2)}
    if "adamw" in name:
        return optim.AdamW, kwargs | ctx.adam_kwargs
    betas = (("beta1", args.adam_beta1), ("beta2", args.adam_beta2), ("beta3", 0.9999))
    kwargs["betas"] = tuple(float(extra.get(key, default)) for key, default in betas)
    kwargs["alpha"] = float(extra.get("alpha", 5.0))
    kwargs["eps"] = float(extra.get("eps", args.adam_epsilon))
    kwargs |= {key: int(extra[key]) for key in ("t_alpha", "t_beta3") if key in extra}
    return optim.AdEMAMix, kwargs


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _replace(names: dict[Any, Any], name: Any, value: Any) -> None:
    _before.append((names, name, names.get(name, _ABSENT)))
    names[name] = value


_before: list[tuple[dict[Any, Any], Any, Any]] = []
