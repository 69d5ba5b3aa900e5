"""LoRA on nn.MultiheadAttention: PEFT's values, outputs and files; merging; what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyqlora import LoraConfig, PeftModel, get_peft_model


class Attending(nn.Module):
    def __init__(self, kdim=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=kdim)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def attending():
    torch.manual_seed(0)
    return Attending()


def config(library=None, **changes):
    kind = LoraConfig if library is None else library.LoraConfig
    return kind(**{"r": 2, "target_modules": ["attention"], "init_lora_weights": False, **changes})


def x():
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("init", [True, False])
def test_values_outputs_gradients_and_files_are_pefts(tmp_path, init):
    peft = pytest.importorskip("peft")
    models = []
    for library in (peft, __import__("pyqlora")):
        base = attending()
        torch.manual_seed(5)
        models.append(library.get_peft_model(base, config(library, init_lora_weights=init)))
        models[-1](x()).square().sum().backward()
    theirs, ours = models
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, others[name], msg=name)  # PEFT's forward moves the base weight a little
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(ours(x()), theirs(x()))
    for writer, reader in ((theirs, PeftModel), (ours, peft.PeftModel)):
        writer.save_pretrained(tmp_path / "a")
        torch.testing.assert_close(reader.from_pretrained(attending(), tmp_path / "a")(x()), ours(x()))


@pytest.mark.parametrize("training", [True, False])
def test_merge_and_its_undoing(training):
    base = attending().train(training)
    plain, model = base(x()), get_peft_model(base, config())
    adapted = model(x())
    assert not torch.allclose(adapted, plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(x()), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x()), adapted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x()), adapted)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert type(merged.attention) is nn.MultiheadAttention and not hasattr(merged.attention.out_proj, "base_layer")
    torch.testing.assert_close(merged(x()), adapted)
    torch.testing.assert_close(model.unload()(x()), plain)


def test_the_layer_shows_the_attributes_of_the_base():
    base = attending().attention
    layer = get_peft_model(attending(), config()).base_model.model.attention
    for name in ("embed_dim", "kdim", "num_heads", "dropout", "batch_first", "head_dim", "bias_k", "add_zero_attn"):
        assert getattr(layer, name) == getattr(base, name)
    assert torch.equal(layer.in_proj_weight, base.in_proj_weight)
    assert layer.out_proj is layer.get_base_layer().out_proj.base_layer
    with pytest.raises(AttributeError):
        layer.nothing  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = get_peft_model(attending().to(dtype), config())
    output = model(x().to(dtype))
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="Only same embed for query/key/value"):
        get_peft_model(Attending(kdim=3), config())
    with pytest.raises(ValueError, match="please set use_dora to False"):
        get_peft_model(attending(), config(use_dora=True))
    with pytest.raises(ValueError, match="lora_bias=True is not supported"):
        get_peft_model(attending(), config(lora_bias=True))
    with pytest.warns(UserWarning, match="has no effect on MultiheadAttention"):
        get_peft_model(attending(), config(lora_dropout=0.1))
    odd = attending()
    odd.attention.out_proj = nn.Identity()
    with pytest.raises(TypeError, match="out_proj must be an instance of"):
        get_peft_model(odd, config())
    model = get_peft_model(attending(), config()).eval()
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model(x(), adapter_names=["default"] * 4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@torch.no_grad()
def test_runs_in_fsdp():
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = get_peft_model(attending(), config()).eval()
        expected = model(x())
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(sharded(x()), expected)
    finally:
        torch.distributed.destroy_process_group()
