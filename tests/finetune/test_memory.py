from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("psutil")

import tiny_model

from pyqlora.finetune import memory
from pyqlora.finetune.options import Options

CPU = torch.device("cpu")


def test_measured_bytes_are_plausible():
    assert 1e7 < memory.used_bytes(CPU) < 1.1 * memory.peak_bytes(CPU)  # the kernel counts the peak in batches
    assert memory.free_bytes(CPU) > 1e6


def test_tied_weights_count_once():
    model = tiny_model.model()
    expected = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert memory.tensor_bytes(model, trained=True) + memory.tensor_bytes(model, trained=False) == expected


@pytest.mark.parametrize(("free", "recompute"), [(10**12, False), (10**6, True)])
def test_activations_are_recomputed_where_memory_is_short(monkeypatch, free, recompute):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    estimate = memory.estimate(tiny_model.model(), Options(), 1000, 100, torch.float32)
    assert estimate.recompute is recompute
    kept = 1000 * 4 * (14 * tiny_model.HIDDEN + 6 * tiny_model.INTERMEDIATE) * tiny_model.LAYERS
    assert (estimate.activations > kept) is not recompute
    assert estimate.total == estimate.now + estimate.adapter + estimate.activations
