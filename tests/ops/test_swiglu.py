"""swiglu against float64: values and gradients over the range of the exponential, sizes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from pyqlora import _C
from pyqlora.ops.swiglu import serves, swiglu

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 9, 31, 1023, 1024, 1025, 20011]


def inputs(size, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    gate, up, dy = (torch.randn(size, generator=g).to(dtype) for _ in range(3))
    return (gate * 3).requires_grad_(), up.requires_grad_(), dy


def compare(gate, up, dy):
    """Against float64: about ten roundings of half a unit of float32, and one to the dtype."""
    y = swiglu(gate, up)
    y.backward(dy)
    leaves = [t.detach().double().requires_grad_() for t in (gate, up)]
    want = silu(leaves[0]) * leaves[1]
    want.backward(dy.double())
    g, u, d = leaves[0].detach(), leaves[1].detach(), dy.double()
    slope = g.sigmoid() * (1 + g.abs() * (-g).sigmoid())
    float32 = 12 * 2.0**-24
    sizes = want.detach().abs(), slope * (u * d).abs(), leaves[1].grad.abs()
    rounding = torch.finfo(gate.dtype).eps if gate.dtype != torch.float32 else 0
    # Below -87 the exponential is 0, and so are results of this size.
    least = torch.finfo(gate.dtype).smallest_normal * torch.finfo(gate.dtype).eps + 2e-36 * (1 + u.abs()) * (
        1 + d.abs()
    )
    exacts = want.detach(), leaves[0].grad, leaves[1].grad
    for name, got, exact, size in zip(("y", "dgate", "dup"), (y, gate.grad, up.grad), exacts, sizes, strict=True):
        assert got.dtype == gate.dtype and got.shape == gate.shape
        assert ((got.double() - exact).abs() <= float32 * size + rounding * exact.abs() + least).all(), name


@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(isa, size):
    compare(*inputs(size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_16_bits_are_rounded_once(isa, dtype):
    compare(*inputs((3, 5, 700), dtype))


def test_the_whole_range(isa):
    gate = torch.cat(
        [torch.linspace(-110, 110, 20001), torch.tensor([0.0, -0.0, 1e-40, -1e-40, -87.0, -87.1, 3e4, -3e4])]
    )
    _, up, dy = inputs(len(gate))
    compare(gate.requires_grad_(), up, dy)


def test_nan_and_infinity(isa):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 1e30, -1e30, 0.0]).repeat(3)
    up = torch.tensor([1.0, 2.0, 1.0, torch.nan, torch.inf, 1.0, 1.0, -torch.inf]).repeat(3)
    torch.testing.assert_close(swiglu(gate, up), silu(gate) * up, equal_nan=True)


def test_strides_and_no_elements():
    gate, up, dy = (t.detach().view(30, 40).t() for t in inputs(1200))
    gate.requires_grad_()
    y = swiglu(gate, up.contiguous())
    torch.testing.assert_close(y, silu(gate) * up)
    (grad,) = torch.autograd.grad(y, gate, dy)
    torch.testing.assert_close(grad, torch.autograd.grad(silu(gate) * up, gate, dy)[0])
    assert swiglu(gate[:0], up[:0]).shape == (0, 30)


def test_the_same_bits_for_any_number_of_threads():
    gate, up, dy = inputs(100_003)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = swiglu(gate, up)
            results.append([y.detach(), *torch.autograd.grad(y, (gate, up), dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keeps_gate_and_up_alone():
    gate, up, _ = inputs(50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_what_it_serves():
    gate, up, _ = inputs(6)
    assert serves(gate, up) and serves(gate.half(), up.half())
    assert not serves(gate.double(), up.double())
    assert not serves(gate, up.bfloat16()) and not serves(gate, up[:1])
    assert not serves(gate.to("meta"), up.to("meta"))
    _C.cpu.set_isa("scalar")
    try:
        assert not serves(gate, up)
    finally:
        _C.cpu.set_isa("")


def test_what_it_refuses():
    gate, up, dy = inputs(6)
    with pytest.raises(ValueError, match=r"swiglu: expected gate and up of one shape, got \[6\] and \[1\]"):
        swiglu(gate, up[:1])
    with pytest.raises(ValueError, match="swiglu: gate: expected float32 or float16 or bfloat16, got another dtype"):
        swiglu(gate.double(), up.double())
    with pytest.raises(ValueError, match="swiglu: up: expected float32, got bfloat16"):
        swiglu(gate, up.bfloat16())
    (grad,) = torch.autograd.grad(swiglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    gate, up = gate.detach(), up.detach()
    with pytest.raises(ValueError, match="swiglu: y: expected 6 elements, got 5"):
        _C.cpu.swiglu(gate, up, torch.empty(5), 1)
    for at, name in enumerate(("up", "dy", "dgate", "dup"), 1):
        arguments = [gate, up, dy, torch.empty(6), torch.empty(6)]
        arguments[at] = torch.empty(5)
        with pytest.raises(ValueError, match=f"swiglu_backward: {name}: expected 6 elements, got 5"):
            _C.cpu.swiglu_backward(*arguments, 1)
