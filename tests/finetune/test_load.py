from __future__ import annotations

import pytest
import torch

from pyqlora.finetune.load import add_lora, pick_device
from pyqlora.finetune.options import Options


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="Embedding has no linear layers outside its output layer"):
        add_lora(torch.nn.Embedding(3, 4), Options())


def test_the_cpu_computes_in_float32():
    device, dtype = pick_device()
    assert dtype == torch.float32 or device.type == "cuda"
