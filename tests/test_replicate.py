"""layer_replication."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyqlora import LoraConfig, get_peft_model


def test_copies_share_weights_and_have_their_own_adapters():
    pytest.importorskip("transformers")
    config = LoraConfig(r=2, layer_replication=[(0, 2), (1, 2)], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny.llama(), config)
    layers = model.get_base_model().model.layers
    assert len(layers) == model.config.num_hidden_layers == 3
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    first, second = (layers[i].self_attn.q_proj.lora_A["default"].weight for i in (1, 2))
    assert not torch.equal(first, second) and layers[2].self_attn.layer_idx == 2
    ids = torch.randint(1, 64, (1, 4))
    assert torch.isfinite(model(ids).logits).all()
    with pytest.raises(ValueError, match="layer replication is used"):
        model.add_adapter("other", config)


def test_no_layers():
    with pytest.raises(ValueError, match="Could not locate the layers attribute"):
        get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], layer_replication=[(0, 1)]))
