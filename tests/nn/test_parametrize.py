import pytest
import torch
import torch.nn.utils.parametrize as P

from pyqlora import quant
from pyqlora.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized


class Experts(torch.nn.Module):
    """A 3-D weight, as mixture-of-experts models have it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
        self.gate_up_proj = torch.nn.Parameter(weight.to(dtype))
        self.reads = 0

    def forward(self, x):
        return torch.einsum("bk,enk->ben", x, self.gate_up_proj) + torch.einsum("bk,enk->ben", x, self.gate_up_proj)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reading_decodes(quant_type, nested, dtype):
    module = Experts(dtype)
    packed, state = quant.quantize_4bit(module.gate_up_proj.detach(), 64, quant_type, nested)
    replace_parameter_4bit(module, "gate_up_proj", nested, quant_type)
    assert torch.equal(module.gate_up_proj, quant.dequantize_4bit(packed, state))
    assert module.parametrizations.gate_up_proj.original.nbytes == packed.nbytes


def test_decoded_once_per_forward_and_never_kept(monkeypatch):
    module = Experts()
    replace_parameter_4bit(module, "gate_up_proj")
    calls = []
    decoder = module.parametrizations.gate_up_proj[0]
    monkeypatch.setattr(decoder, "forward", lambda p: calls.append(0) or quant.dequantize_4bit(p, decoder.quant_state))
    module(torch.randn(2, 64))
    assert len(calls) == 1 and not P._cache and P._cache_enabled == 0
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 63))
    assert not P._cache and P._cache_enabled == 0


def test_state_dict_loads_as_prequantized():
    module, other = Experts(), Experts()
    replace_parameter_4bit(module, "gate_up_proj", compress_statistics=True)
    entries = module.state_dict()
    packed = entries.pop("gate_up_proj")
    other.gate_up_proj = torch.nn.Parameter(packed, requires_grad=False)
    replace_parameter_4bit_prequantized(other, "gate_up_proj", entries, torch.device("cpu"))
    x = torch.randn(2, 64)
    assert torch.equal(other(x), module(x))


def test_errors():
    with pytest.raises(AttributeError, match="Module does not have parameter 'weight'"):
        replace_parameter_4bit(Experts(), "weight")
    with pytest.raises(TypeError, match=r"Parameter 'reads' is not an instance of nn\.Parameter"):
        replace_parameter_4bit(Experts(), "reads")
