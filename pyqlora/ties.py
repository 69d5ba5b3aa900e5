"""Which modules of a model share the weight of its input embedding."""

from __future__ import annotations

import re

from torch import nn


def tied_names(model: nn.Module) -> list[str]:
    """Names of the modules whose weight the model declares to be the input embedding's, itself left out."""
    tied = getattr(model, "_tied_weights_keys", None)
    if not tied or getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    if isinstance(tied, dict):
        for path, module in model.named_modules():  # BART's inner model ties the embeddings of encoder and decoder
            inner = getattr(module, "_tied_weights_keys", None) if path else None
            if isinstance(inner, dict):
                tied = {**tied, **{f"{path}.{key}": f"{path}.{source}" for key, source in inner.items()}}
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
                "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
            )
        own = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        present = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
        present |= {re.sub(r"\.((token_adapter\.)?base_layer|original_module)\.", ".", name) for name in present}
        tied = [key for key, source in tied.items() if source in present]
    return sorted({key.rpartition(".")[0] for key in tied})


def tied_group(model: nn.Module) -> list[str]:
    """Names of the input embedding and of the modules tied to it, in this order; empty if there are none."""
    tied = tied_names(model)
    if not tied or not hasattr(model, "get_input_embeddings"):
        return []
    embedding = model.get_input_embeddings()
    own = [name for name, module in model.named_modules() if module is embedding]
    return own + [name for name in tied if name not in own]
