"""lora_linear_4bit against float64, forward and backward, and as the layers use it."""

from __future__ import annotations

import pytest
import reference
import torch

from pyqlora.ops import lora_linear_4bit as module
from pyqlora.ops.lora_linear import dropped
from pyqlora.ops.lora_linear_4bit import lora_linear_4bit


@pytest.fixture
def gpu(backend):
    if backend.name == "cpu":
        pytest.skip("kernels of the GPU")
    return backend


def weight_of(n, k, device):
    """(a packed weight as lora_linear_4bit takes it, its values in float64)"""
    packed, absmax = reference.quantize_4bit(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), 64, "nf4")
    values = reference.dequantize_4bit(packed, absmax, 64, "nf4", (n, k), torch.float64)
    return (packed.to(device), absmax.to(device), None, None, None, 256, 64, "nf4"), values


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "rank"), [((1,), 64, 8), ((5,), 128, 17), ((2, 35), 192, 16), ((6,), 75, 4)])
def test_equals_float64(gpu, rows, k, rank, factor, dropout):
    n, dtype = 40, torch.bfloat16
    weight, w = weight_of(n, k, gpu.device)
    g = torch.Generator().manual_seed(k)
    x, dy = (torch.randn(*rows, size, generator=g).to(dtype) for size in (k, n))
    a, b, bias = (torch.randn(shape, generator=g).to(factor) for shape in ((rank, k), (n, rank), (n,)))
    torch.manual_seed(7)
    seed = torch.randint(1 << 62, (1,), device=gpu.device)
    torch.manual_seed(7)
    inputs = [t.to(gpu.device).requires_grad_() for t in (x, a, b, bias)]
    y = lora_linear_4bit(inputs[0], weight, [n, k], *inputs[3:], *inputs[1:3], 0.5, dropout)
    y.backward(dy.to(gpu.device))

    exact = [t.detach().double().requires_grad_() for t in (x, a, b, bias)]
    mask = dropped(torch.ones(x.shape).view(-1, k), seed.cpu(), dropout, torch.float32) if dropout else torch.ones(1)
    kept = exact[0] * mask.double().view(x.shape if dropout else 1) / (1 - dropout)
    want = exact[0] @ w.T + exact[3] + 0.5 * (kept @ exact[1].T) @ exact[2].T
    want.backward(dy.double())
    assert y.dtype == dtype and y.shape == (*rows, n)
    # Each of a chain of at most four operands and results is rounded to dtype: relative to the largest of the sums.
    for got, exactly in [(y, want)] + [(i.grad, e.grad) for i, e in zip(inputs, exact, strict=True)]:
        error = (got.detach().cpu().double() - exactly).abs().max()
        assert error <= 4 * 2**-8 * exactly.abs().max(), error / exactly.abs().max()


def test_keeps_only_x(gpu):
    k, n, rank, m = 128, 96, 4, 200
    weight, _ = weight_of(n, k, gpu.device)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=gpu.device, requires_grad=True)
    a, b = (torch.randn(shape, device=gpu.device, requires_grad=True) for shape in ((rank, k), (n, rank)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_4bit(x, weight, [n, k], None, a, b, 1.0, 0.5)
    large = [t for t in kept if t.numel() >= m * n]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_layers_use_it(gpu, monkeypatch):
    from pyqlora import LoraConfig, get_peft_model
    from pyqlora.nn import LinearNF4

    used = []
    apply = module._LoraLinear4bit.apply
    monkeypatch.setattr(module._LoraLinear4bit, "apply", lambda *inputs: used.append(1) or apply(*inputs))
    torch.manual_seed(0)
    layer = LinearNF4(64, 32, compute_dtype=torch.bfloat16).to(gpu.device)
    model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    for rows in (3, 80):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, device=gpu.device)
        fused = model(x)
        assert used.pop() and not used
        handle = layer.register_forward_hook(lambda *_: None)  # who watches the base layer sees it called
        apart = model(x)
        handle.remove()
        assert not used
        assert (fused.double() - apart.double()).abs().max() <= 2**-6 * apart.double().abs().max()
