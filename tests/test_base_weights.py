import pytest
import torch
from torch import nn

import pyqlora


def adapted():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = pyqlora.LoraConfig(target_modules=["1"], modules_to_save=["2"], trainable_token_indices={"0": [1]})
    return pyqlora.get_peft_model(model, config), state


def test_keys_and_values_are_those_before_adapting():
    model, state = adapted()
    found = pyqlora.get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_weights_load_under_those_keys():
    model, state = adapted()
    pyqlora.set_base_model_state_dict(model, {key: value + 1 for key, value in state.items()})
    found = pyqlora.get_base_model_state_dict(model)
    assert all(torch.equal(found[key], value + 1) for key, value in state.items())


def test_missing_and_unexpected_keys():
    model, state = adapted()
    state["other"] = state.pop("1.weight")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\): \['1.weight'\]; Unexpected key\(s\): \['other'\]"):
        pyqlora.set_base_model_state_dict(model, state)
    assert pyqlora.set_base_model_state_dict(model, state, strict=False) == (["1.weight"], ["other"])
