from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("psutil")

import tiny

import pyqlora
from pyqlora.estimate import CHECKPOINTING, Run, Shape, parts
from pyqlora.finetune import memory
from pyqlora.finetune.options import Options

CPU = torch.device("cpu")


def test_measured_bytes_are_plausible():
    assert 1e7 < memory.used_bytes(CPU) < 1.1 * memory.peak_bytes(CPU)  # the kernel counts the peak in batches
    assert memory.free_bytes(CPU) > 1e6


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_activations_are_recomputed_where_memory_is_short(monkeypatch, checkpointing):
    model = tiny.llama(num_hidden_layers=8)
    shape = Shape.of(model)
    model = pyqlora.get_peft_model(model, pyqlora.LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.adapter(4)
    needs = parts(shape, "QLoRA", Run(10, 100, trained, 4, checkpointing=checkpointing, labelled=90))
    enough = sum(needs[part] for part in memory.ADDED) / memory.COMFORTABLE
    monkeypatch.setattr(memory, "free_bytes", lambda device: enough + 1 if checkpointing != "full" else 0)
    estimate = memory.estimate(model, Options(), 10, 100, 90, torch.float32)
    assert estimate.checkpointing == checkpointing
    assert estimate.added == {part: needs[part] for part in memory.ADDED} | {"gradients": 4 * trained}
    assert estimate.total == estimate.now + sum(estimate.added.values())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="glibc on x86 is what it is about")
def test_freed_memory_is_returned():
    memory.return_freed_memory()
    before = memory.used_bytes(CPU)
    blocks = [torch.ones(1 << 20) for _ in range(64)]
    pins = [torch.ones(100) for _ in range(64)]
    del blocks
    assert memory.used_bytes(CPU) - before < 32 << 20 and pins
