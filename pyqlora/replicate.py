"""layer_replication: a deeper model from ranges of a model's layers, which share the base weights."""

from __future__ import annotations

import copy

from torch import nn

# Where architectures keep their list of layers, below the innermost `model` or `bert`.
LAYER_LISTS = ("layers", "encoder.layer", "h")


def replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> None:
    """Replace the model's layers by those of the [start, end) ranges one after another, in place.

    [[0, 4], [2, 5]] makes seven layers 0 1 2 3 2 3 4. Copies share parameters; each gets an adapter of its own.

    Raises:
        ValueError: the model keeps its layers in none of the known places.
    """
    root = model
    while hasattr(root, "model"):
        root = root.model
    root = getattr(root, "bert", root)
    for path in LAYER_LISTS:
        parent_name, _, name = path.rpartition(".")
        parent = getattr(root, parent_name, None) if parent_name else root
        layers = getattr(parent, name, None)
        if isinstance(layers, nn.ModuleList):
            break
    else:
        raise ValueError(
            "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible "
            f"architectures, with their layers in one of: {', '.join(LAYER_LISTS)}"
        )
    copies = nn.ModuleList(_sharing_copy(layers[i]) for start, end in ranges for i in range(start, end))
    for index, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(parent, name, copies)
    if hasattr(getattr(root, "config", None), "num_hidden_layers"):
        root.config.num_hidden_layers = len(copies)


def _sharing_copy(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer, memo={id(parameter): parameter for parameter in layer.parameters()})
