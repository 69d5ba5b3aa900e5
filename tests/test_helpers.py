"""Small tools: is it an adapter, rescaling, DoRA's kept norms."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from pyqlora import LoraConfig, get_peft_model
from pyqlora.helpers import DoraCaching, check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale


def adapted(**changes):
    return get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], init_lora_weights=False, **changes))


def x():
    return torch.randn(2, 11, generator=torch.Generator().manual_seed(3))


def test_check_if_peft_model(tmp_path):
    assert not check_if_peft_model(tmp_path)
    adapted().save_pretrained(tmp_path)
    assert check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"some": "thing"}')
    assert not check_if_peft_model(tmp_path)


def test_rescaling_is_for_the_context_only():
    model = adapted()
    one, zero = model(x()), tiny.mlp()(x())
    with rescale_adapter_scale(model, 0):
        torch.testing.assert_close(model(x()), zero)
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(model, 0.5):
        1 / 0  # noqa: B018
    assert torch.equal(model(x()), one)
    with pytest.raises(ValueError, match="only supported for models with"), rescale_adapter_scale(tiny.mlp(), 1):
        pass
    with pytest.raises(TypeError, match="should be of type float"), rescale_adapter_scale(model, "2"):
        pass


def test_dora_keeps_norms_in_eval_mode_and_on_request_only():
    model = adapted(use_dora=True).eval()
    layer, want = model.base_model.model.up, model(x())
    assert not layer._dora_cache
    with DoraCaching():
        assert torch.equal(model(x()), want) and layer._dora_cache
        layer.lora_B["default"].weight.data += 1
        stale = model(x())
        model.train()
        assert not layer._dora_cache
        assert not torch.equal(model(x()), stale) and not layer._dora_cache
    model.eval()
    DoraCaching()(True)
    assert torch.equal(model(x()), model(x())) and layer._dora_cache
    DoraCaching()(False)
    model(x())
    assert not layer._dora_cache


@pytest.mark.parametrize("active", [True, False])
def test_disable_input_dtype_casting(active):
    model = nn.Sequential(nn.Conv1d(3, 4, 1))
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    expected = model(torch.ones(1, 3, 2))
    layer = model.base_model.model[0]
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):  # weights wait in fp16 and are widened for use
        factor.half()
        factor.register_forward_pre_hook(lambda module, args: module.float() and None)
        factor.register_forward_hook(lambda module, args, output: module.half() and None)
    with disable_input_dtype_casting(model, active):
        if active:
            torch.testing.assert_close(model(torch.ones(1, 3, 2)), expected, rtol=1e-2, atol=1e-2)
        else:
            with pytest.raises(RuntimeError, match="type"):
                model(torch.ones(1, 3, 2))
    assert layer.cast_input_dtype_enabled
