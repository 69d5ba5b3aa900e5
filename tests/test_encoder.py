"""torch's encoder layers run their adapters in eval mode too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyqlora import LoraConfig, get_peft_model


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], ["linear2", "self_attn"]])
@torch.no_grad()
def test_eval_runs_the_adapters(targets):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    base = encoder()(x)
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = model.train()(x)
    assert not torch.allclose(trained, base, atol=1e-3)
    torch.testing.assert_close(model.eval()(x), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.unload().eval()(x), base, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False))
    inner = model.base_model.model[0]
    trained = model.train() and inner(x, src_key_padding_mask=padding)
    model.eval()
    torch.testing.assert_close(
        inner(x, src_key_padding_mask=padding)[~padding], trained[~padding], rtol=1e-5, atol=1e-5
    )
    base = model.unload()
    assert base[0].use_nested_tensor
    assert torch.equal(base[0](x, src_key_padding_mask=padding), encoder()[0](x, src_key_padding_mask=padding))
