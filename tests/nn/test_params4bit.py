import copy
import pickle

import pytest
import torch

from pyqlora import nn, quant
from pyqlora.nn import Params4bit


def parameter(**kwargs):
    data = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    return Params4bit(data, quant_type="nf4", **kwargs)


def test_to_a_device_quantizes_in_place():
    param = parameter(blocksize=128)
    data = param.detach().clone()
    assert param.to("cpu") is param
    packed, state = quant.quantize_4bit(data, 128, "nf4", True)
    assert torch.equal(param.detach(), packed) and param.quant_state == state and param.bnb_quantized


def test_casts_apply_to_float_data_only():
    param = parameter()
    assert param.to(torch.float16).dtype == torch.float16 and not param.bnb_quantized
    packed = param.to("cpu").to(torch.float16)
    assert packed.dtype == torch.uint8 and packed.quant_state is param.quant_state
    assert param.half() is param


def test_meta_is_no_device_to_quantize_on():
    param = parameter().to("meta")
    assert param.device.type == "meta" and param.shape == (48, 64) and not param.bnb_quantized


def test_fields_of_the_state_by_name():
    param = parameter()
    with pytest.raises(AttributeError, match="absmax"):
        _ = param.absmax
    param.to("cpu")
    state = param.quant_state
    assert param.absmax is state.absmax and param.quant_map is param.code is state.code
    assert param.nested_absmax is state.state2.absmax and param.nested_quant_map is state.state2.code
    assert (param.nested_blocksize, param.nested_dtype) == (256, torch.float32)
    assert param.offset is param.nested_offset is state.offset and param.state2 is state.state2
    with pytest.raises(AttributeError, match="not quantized that way"):
        _ = parameter(compress_statistics=False).to("cpu").nested_absmax


@pytest.mark.parametrize("cut", [torch.chunk, torch.Tensor.chunk, lambda t, n: torch.split(t, len(t) // n)])
def test_pieces_keep_the_state(cut):
    param = parameter().to("cpu")
    first, second = cut(param, 2)
    assert type(first) is Params4bit and first.quant_state is second.quant_state is param.quant_state
    assert first.bnb_quantized and first.shape == (768, 1)
    assert torch.equal(torch.cat([first, second]), param.detach())


def test_other_results_are_plain_tensors():
    param = parameter().to("cpu")
    assert type(param + 1) is type(param.view(-1)) is type(param.detach()) is torch.Tensor


def test_shallow_and_deep_copies():
    param = parameter().to("cpu")
    shallow, deep = copy.copy(param), copy.deepcopy(param)
    assert shallow.data_ptr() == param.data_ptr() and shallow.quant_state is param.quant_state
    assert deep.data_ptr() != param.data_ptr() and deep.quant_state is not param.quant_state
    assert deep.quant_state == param.quant_state and torch.equal(deep.detach(), param.detach())
    assert type(shallow) is type(deep) is Params4bit
    pair = copy.deepcopy([param, param])
    assert pair[0] is pair[1]


def test_from_prequantized_takes_its_settings_from_the_entries():
    packed, state = quant.quantize_4bit(torch.randn(48, 64), 32, "fp4", True, torch.bfloat16)
    module = torch.nn.Module()
    param = Params4bit.from_prequantized(packed, state.as_dict(packed=True), device="cpu", module=module)
    assert (param.blocksize, param.quant_type, param.compress_statistics) == (32, "fp4", True)
    assert param.quant_storage == torch.bfloat16 and module.quant_state is param.quant_state == state


def test_made_without_memory_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        layer = nn.Linear4bit(64, 32, quant_type="nf4")
    assert type(layer.weight) is Params4bit and layer.weight.is_meta and layer.weight.quant_type == "nf4"
    full = nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    layer.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(layer(torch.eye(64)), full(torch.eye(64)))
    assert copy.deepcopy(layer).weight.requires_grad is False


def test_pickled_parameters_are_refused_where_only_tensors_may_be_read(tmp_path):
    layer = nn.Linear4bit(64, 32).to("cpu")
    torch.save({"weight": layer.weight}, tmp_path / "old.pt")
    with pytest.raises(pickle.UnpicklingError, match="Params4bit"):
        torch.load(tmp_path / "old.pt", weights_only=True)
    torch.save(layer.state_dict(), tmp_path / "tensors.pt")
    nn.Linear4bit(64, 32).load_state_dict(torch.load(tmp_path / "tensors.pt", weights_only=True))
