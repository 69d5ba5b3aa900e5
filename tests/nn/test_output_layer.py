"""The output layer of a language model, whose products for single tokens are linear_dense."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from pyqlora import _C
from pyqlora.nn import output_layer
from pyqlora.nn.output_layer import OutputLayer, use_output_layer


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what linear_dense was called with."""
    calls = []

    def counted(x, *args):
        calls.append(list(x.shape))
        return counted.linear_dense(x, *args)

    counted.linear_dense = output_layer.linear_dense
    monkeypatch.setattr(output_layer, "linear_dense", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_without_gradients(dtype, bias, calls):
    model = Model(nn.Linear(24, 50, bias=bias, dtype=dtype))
    plain, x = copy.deepcopy(model.head), torch.randn(2, 3, 24, dtype=dtype)
    unit = torch.finfo(dtype).eps
    assert use_output_layer(model) and type(model.head) is OutputLayer
    assert not use_output_layer(model)  # once is enough
    with torch.no_grad():
        torch.testing.assert_close(model.head(x[:, -1:]), plain(x[:, -1:]), rtol=4 * unit, atol=4 * unit)
        assert calls == [[2, 1, 24]]
        assert torch.equal(model.head(x), plain(x))
    y = model.head(x[:, -1:])
    y.sum().backward()
    assert calls == [[2, 1, 24]] and model.head.weight.grad is not None


@torch.no_grad()
def test_state_hooks_copies_and_pickles(calls):
    model = Model(nn.Linear(8, 6))
    before, seen = dict(model.named_parameters()), []
    model.head.register_forward_hook(lambda module, args, y: seen.append(y))
    use_output_layer(model)
    assert all(p is before[name] for name, p in model.named_parameters()) and isinstance(model.head, nn.Linear)
    x = torch.randn(1, 8)
    y = model.head(x)
    assert seen == [y] and len(calls) == 1
    model.head._forward_hooks.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.head) is OutputLayer and torch.equal(other.head(x), y)


def test_what_stays():
    class Own(nn.Linear):
        pass

    for head in (None, Own(8, 6), nn.Linear(8, 6, device="meta"), nn.Sequential(nn.Linear(8, 6))):
        kind = type(head)
        assert not use_output_layer(Model(head)) and type(head) is kind
    _C.cpu.set_isa("scalar")
    try:
        assert not use_output_layer(Model(nn.Linear(8, 6)))
    finally:
        _C.cpu.set_isa("")


def test_loaded_models_have_it(tmp_path, calls):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import tiny

    import pyqlora

    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    config = pyqlora.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, device_map="cpu")
    model = load(tmp_path / "model", quantization_config=config).eval()
    assert type(model.lm_head) is OutputLayer and model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(1, 9)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert calls == [[1, 1, 32]] * 3
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").eval()
    assert type(again.lm_head) is OutputLayer
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert "pyqlora" not in (tmp_path / "saved" / "config.json").read_text()
