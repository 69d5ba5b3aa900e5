"""lora_linear_4bit against float64, forward and backward, and as the layers use it."""

from __future__ import annotations

import pytest
import reference
import torch

from pyqlora import _C
from pyqlora.ops import lora_linear_4bit as module
from pyqlora.ops.lora_linear import dropped
from pyqlora.ops.lora_linear_4bit import lora_linear_4bit


def weight_of(n, k, device):
    """(a packed weight as lora_linear_4bit takes it, its values in float64)"""
    packed, absmax = reference.quantize_4bit(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), 64, "nf4")
    values = reference.dequantize_4bit(packed, absmax, 64, "nf4", (n, k), torch.float64)
    return (packed.to(device), absmax.to(device), None, None, None, 256, 64, "nf4"), values


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "rank"), [((1,), 64, 8), ((5,), 128, 17), ((2, 35), 192, 16), ((6,), 75, 4)])
def test_equals_float64(backend, rows, k, rank, factor, dropout):
    n, dtype = 40, torch.bfloat16
    weight, w = weight_of(n, k, backend.device)
    g = torch.Generator().manual_seed(k)
    x, dy = (torch.randn(*rows, size, generator=g).to(dtype) for size in (k, n))
    a, b, bias = (torch.randn(shape, generator=g).to(factor) for shape in ((rank, k), (n, rank), (n,)))
    torch.manual_seed(7)
    seed = torch.randint(1 << 62, (1,), device=backend.device)
    torch.manual_seed(7)
    inputs = [t.to(backend.device).requires_grad_() for t in (x, a, b, bias)]
    y = lora_linear_4bit(inputs[0], weight, [n, k], *inputs[3:], *inputs[1:3], 0.5, dropout)
    y.backward(dy.to(backend.device))

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


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_without_a_gradient_the_same_bits(backend, rows, dropout):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    g = torch.Generator().manual_seed(rows)
    x, a, b = (torch.randn(shape, generator=g).bfloat16().to(backend.device) for shape in ((rows, k), (3, k), (n, 3)))
    results = []
    for trained in (True, False):
        torch.manual_seed(7)
        results.append(lora_linear_4bit(x, weight, [n, k], None, a.requires_grad_(trained), b, 0.5, dropout))
        with torch.no_grad():
            torch.manual_seed(7)
            results.append(lora_linear_4bit(x, weight, [n, k], None, a, b, 0.5, dropout))
    assert results[0].requires_grad and results[0].shape == (rows, n)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "xb", "ab"])
def test_gradients_that_are_asked_for(backend, trained):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (11, k), "a": (3, k), "b": (n, 3)}
    values = {name: torch.randn(shape, generator=g).bfloat16().to(backend.device) for name, shape in shapes.items()}
    dy = torch.randn(11, n, generator=g).bfloat16().to(backend.device)

    def gradients(wanted: str) -> dict[str, torch.Tensor | None]:
        inputs = {name: value.clone().requires_grad_(name in wanted) for name, value in values.items()}
        torch.manual_seed(7)
        y = lora_linear_4bit(inputs["x"], weight, [n, k], None, inputs["a"], inputs["b"], 0.5, 0.25)
        y.backward(dy)
        return {name: value.grad for name, value in inputs.items()}

    every, some = gradients("xab"), gradients(trained)
    assert all(torch.equal(some[name], every[name]) if name in trained else some[name] is None for name in values)


def test_no_rows(backend):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    x, a, b = (
        torch.ones(shape, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
        for shape in ((0, k), (3, k), (n, 3))
    )
    lora_linear_4bit(x, weight, [n, k], None, a, b, 0.5, 0.25).sum().backward()
    assert x.grad.shape == (0, k) and not a.grad.any() and not b.grad.any()


def test_the_native_backward_checks_a():
    weight, _ = weight_of(40, 64, "cpu")
    *packed_and_scales, blocksize, quant_type = weight
    dy, dx, x, a, b, h = (torch.ones(shape) for shape in ((2, 40), (2, 64), (2, 64), (2, 64), (40, 3), (2, 3)))
    with pytest.raises(ValueError, match="lora_linear_4bit_backward: a: expected 192 elements, got 128"):
        _C.cpu.lora_linear_4bit_backward(
            *(dy, *packed_and_scales, dx, 40, 64, blocksize, quant_type, x, a, b, h, 1.0, None, 0.0, None, b.clone(), 1)
        )


def test_strided_inputs(backend):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    g = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=g).bfloat16().to(backend.device) for shape in ((k, 3), (k, 8), (8, n)))
    y = lora_linear_4bit(x.t(), weight, [n, k], None, a.t(), b.t(), 1.0)
    plain = (t.t().contiguous() for t in (x, a, b))
    x, a, b = plain
    assert torch.equal(y, lora_linear_4bit(x, weight, [n, k], None, a, b, 1.0))


def test_errors(backend):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    x, a, b = (torch.ones(shape, dtype=torch.bfloat16, device=backend.device) for shape in ((2, k), (8, k), (n, 8)))
    with pytest.raises(ValueError, match=r"linear_4bit: x: expected a last dimension of 64, got shape \[2, 63\]"):
        lora_linear_4bit(x[:, 1:], weight, [n, k], None, a, b, 1.0)
    if backend.name == "cpu":
        with pytest.raises(ValueError, match="linear_4bit: s: expected 14 elements, got 16"):
            lora_linear_4bit(x, weight, [n, k], None, a, b[:, 1:], 1.0)
        with pytest.raises(ValueError, match="lora_down: a: expected a multiple of 64 elements, got 504"):
            lora_linear_4bit(x, weight, [n, k], None, a[:, 1:], b, 1.0)


@pytest.mark.parametrize("which", range(3))
def test_serves_no_float64(which):
    tensors = [torch.ones(1, dtype=torch.float64 if i == which else torch.float32) for i in range(3)]
    assert not module.serves(*tensors) and module.serves(*(t.float() for t in tensors))


def test_keeps_only_x(backend):
    k, n, rank, m = 128, 96, 4, 200
    weight, _ = weight_of(n, k, backend.device)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
    a, b = (torch.randn(shape, device=backend.device, requires_grad=True) for shape in ((rank, k), (n, rank)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_4bit(x, weight, [n, k], None, a, b, 1.0, 0.5)
    large = [t for t in kept if t.numel() >= m * n]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


@pytest.fixture
def used(monkeypatch):
    """A list that grows with each call that is to have gradients."""
    calls, apply = [], module._LoraLinear4bit.apply
    monkeypatch.setattr(module._LoraLinear4bit, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    return calls


def adapted_layer(device):
    from pyqlora import LoraConfig, get_peft_model
    from pyqlora.nn import LinearNF4

    torch.manual_seed(0)
    layer = LinearNF4(64, 32, compute_dtype=torch.bfloat16).to(device)
    model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    return layer, model


def test_layers_use_it(backend, used):
    layer, model = adapted_layer(backend.device)
    for rows in (3, 80):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, device=backend.device)
        fused = model(x)
        assert used.pop() and not used
        handle = layer.register_forward_hook(lambda *_: None)  # who watches the base layer sees it called
        apart = model(x)
        handle.remove()
        assert not used
        assert (fused.double() - apart.double()).abs().max() <= 2**-6 * apart.double().abs().max()


@torch.no_grad()
def test_prepared_gives_the_same_bits_from_the_tensors_as_they_are_then(backend):
    n, k = 40, 64
    weight, _ = weight_of(n, k, backend.device)
    g = torch.Generator().manual_seed(0)
    x, a, b, bias = (
        torch.randn(shape, generator=g).bfloat16().to(backend.device) for shape in ((2, 3, k), (3, k), (n, 3), (n,))
    )
    call = module.prepared(x, a, b, bias, weight, [n, k], 0.5)
    assert (call is None) == (backend.name != "cpu")
    assert module.prepared(x, a, b.T.contiguous().T, bias, weight, [n, k], 0.5) is None
    if call is None:
        return
    for rows in (x, x[:, 1:], x[:0], x[0, 0]):
        assert torch.equal(call(rows), lora_linear_4bit(rows, weight, [n, k], bias, a, b, 0.5))
    before = call(x)
    b.mul_(2)
    assert torch.equal(call(x), lora_linear_4bit(x, weight, [n, k], bias, a, b, 0.5)) and not torch.equal(
        call(x), before
    )
    with pytest.raises(ValueError, match=r"linear_4bit: x: expected a last dimension of 64, got shape \[2, 32\]"):
        call(x.view(-1, 32)[:2])
    with pytest.raises(ValueError, match="linear_4bit: y: expected 240 elements, got 0"):
        _C.cpu.LoraLinear4bit(*weight[:6], bias, n, k, *weight[6:], a, b, 0.5).run(x, x.new_empty(0), False, 1)


@pytest.mark.parametrize("rows", [3, 80])
def test_layers_use_it_under_autocast(backend, used, rows):
    """Where x has autocast's dtype nothing is cast, nor another function taken."""
    _, model = adapted_layer(backend.device)

    def run(dtype=None):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16().to(backend.device)
        with torch.autocast(backend.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(x.requires_grad_())
        y.float().square().sum().backward()
        factors = [p for p in model.parameters() if p.requires_grad]
        results = [y, x.grad, *(p.grad for p in factors)]
        for p in factors:
            p.grad = None
        return results

    plain, same = run(), run(torch.bfloat16)
    assert used == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    other = run(torch.float16)
    assert len(used) == (3 if backend.name == "cpu" else 2)  # on the CPU autocast lowers nothing
    for a, b in zip(plain, other, strict=True):
        assert a.dtype == b.dtype and (a.double() - b.double()).abs().max() <= 2**-5 * a.double().abs().max()
