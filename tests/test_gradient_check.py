"""The first backward pass says whether adapters get gradients."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from torch.utils.checkpoint import checkpoint

from pyqlora import LoraConfig, get_peft_model


def adapted(**changes):
    return get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], **changes)).train()


def x():
    return torch.randn(2, 11)


def test_nothing_is_said_where_gradients_arrive():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x())  # an output that no one uses
        model(x()).sum().backward()
        other = adapted()
        torch.autograd.grad(other(x()).sum(), [p for p in other.parameters() if p.requires_grad])
    assert model._gradient_checked
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_output_that_depends_on_nothing_trainable_is_said_at_once():
    model = adapted()
    model.base_model.model.up.forward = model.base_model.model.up.base_layer.forward
    with pytest.warns(UserWarning, match=r"No gradient will reach the adapters.*enable_input_require_grads"):
        model(x())


def test_adapters_cut_off_beside_a_head_that_is_trained_are_said_at_the_backward_pass():
    model = adapted(modules_to_save=["head"])
    root = model.base_model.model
    inner = root.up.forward
    root.up.forward = lambda value: checkpoint(inner, value, use_reentrant=True)
    loss = model(x()).sum()
    with pytest.warns(UserWarning, match=r"No adapter parameter has received a gradient.*use_reentrant=False"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No adapter parameter")
        model(x()).sum().backward()  # once is enough


def test_frozen_adapters_are_no_mistake():
    model = adapted(inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x())
