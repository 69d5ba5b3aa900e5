from __future__ import annotations

import pytest
import torch

from pyqlora.finetune import checkpoint
from pyqlora.finetune.options import Options
from pyqlora.optim import PagedAdamW8bit

pytest.importorskip("yaml")


def trained(steps: int, seed: int = 0):
    """A layer above the 8-bit optimizer's smallest size, after some steps on random gradients."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(96, 64)
    optimizer = PagedAdamW8bit(layer.parameters(), lr=1e-2)
    advance(layer, optimizer, steps)
    return layer, optimizer


def advance(layer, optimizer, steps):
    for _ in range(steps):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_going_on_equals_not_having_stopped(tmp_path):
    layer, optimizer = trained(3)
    state = {"done": 3, "before": {"loss": 1.5, "completions": ["a"]}}
    directory = checkpoint.save(tmp_path, layer, optimizer, Options(model="m"), state)
    advance(layer, optimizer, 2)
    again, other = trained(0, seed=1)
    loaded = checkpoint.load_state(checkpoint.find(tmp_path))
    assert loaded.items() >= state.items()
    checkpoint.restore(directory, again, other, loaded)
    advance(again, other, 2)
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensors_leave_a_tree_and_come_back():
    tree = {"0": {"m": torch.arange(3), "step": 4, "inner": {"q": torch.ones(2), "name": "x"}}, "1": {}}
    tensors = {}
    stripped = checkpoint.take_tensors(tree, "optimizer", tensors)
    assert stripped["0"] == {
        "m": {"tensor": "optimizer.0.m"},
        "step": 4,
        "inner": {"q": {"tensor": "optimizer.0.inner.q"}, "name": "x"},
    }
    back = checkpoint.put_tensors(stripped, tensors.__getitem__)
    assert back["0"]["m"] is tree["0"]["m"] and back["0"]["inner"]["q"] is tree["0"]["inner"]["q"]


def test_find(tmp_path):
    directory = checkpoint.save(tmp_path / "out", *trained(1), Options(model="m"), {})
    assert checkpoint.find(tmp_path / "out") == checkpoint.find(directory) == directory
    with pytest.raises(ValueError, match=r"no checkpoint there, expected .*/checkpoint with state.json and state"):
        checkpoint.find(tmp_path)


def test_damaged_state(tmp_path):
    directory = checkpoint.save(tmp_path, *trained(1), Options(model="m"), {})
    (directory / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json: not a checkpoint's state"):
        checkpoint.load_state(directory)


def test_another_models_checkpoint(tmp_path):
    directory = checkpoint.save(tmp_path, *trained(1), Options(model="m"), {})
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the checkpoint's adapter does not fit this model and its --targets"):
        checkpoint.restore(directory, other, trained(0)[1], checkpoint.load_state(directory))
