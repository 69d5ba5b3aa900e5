"""linear_4bit against float64, forward and backward, on every path: few rows, many rows, rows that share blocks."""

from __future__ import annotations

import threading

import pytest
import torch

from pyqlora.ops.linear_4bit import linear_4bit
from pyqlora.ops.quantize import dequantize_4bit, quantize_4bit, quantize_blockwise

ROWS = [0, 1, 2, 3, 7, 8, 9, 17, 64, 65]
SHAPES = [(1, 1), (5, 7), (64, 64), (33, 96), (17, 333), (48, 320), (31, 65)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(n, k, blocksize=64, quant_type="nf4", nested=False):
    """(arguments of linear_4bit after x and before bias, the decoded weight in float64)."""
    packed, absmax = quantize_4bit(torch.randn(n, k), blocksize, quant_type)
    scales = (absmax, None, None, None, 256)
    if nested:
        code = torch.linspace(-1, 1, 256)
        offset = absmax.mean().reshape(1)
        codes, nested_absmax = quantize_blockwise(absmax - offset, code, 256)
        scales = (codes, nested_absmax, code, offset, 256)
    arguments = (packed, *scales, blocksize, quant_type, [n, k])
    return arguments, dequantize_4bit(packed, *scales, blocksize, quant_type, [n, k], torch.float32).double()


def assert_near(result, exact, magnitude, terms):
    """Float32 sums of `terms` products whose absolute values add up to `magnitude`, then one rounding to the dtype."""
    eps = torch.finfo(torch.float32).eps
    bound = (terms + 2) * eps * magnitude
    if result.dtype != torch.float32:
        bound = bound + torch.finfo(result.dtype).eps * exact.abs() + torch.finfo(result.dtype).smallest_normal
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_float64(isa, shape, dtype):
    n, k = shape
    arguments, w = weight(n, k)
    for rows in ROWS:
        x = torch.randn(rows, k).to(dtype).requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        y = linear_4bit(x, *arguments, bias)
        assert y.shape == (rows, n) and y.dtype == dtype
        xd, bd = x.detach().double(), bias.detach().double()
        assert_near(y.detach(), xd @ w.T + bd, xd.abs() @ w.T.abs() + bd.abs(), k)
        dy = torch.randn(rows, n).to(dtype)
        y.backward(dy)
        dyd = dy.double()
        assert_near(x.grad, dyd @ w, dyd.abs() @ w.abs(), n)
        assert bias.grad.dtype == dtype
        assert_near(bias.grad, dyd.sum(0), dyd.abs().sum(0), rows)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_formats(isa, blocksize, nested, quant_type):
    for n, k in [(40, 128), (9, 75)]:
        arguments, w = weight(n, k, blocksize, quant_type, nested)
        for rows in (1, 5, 40):
            x = torch.randn(2, rows, k)
            y = linear_4bit(x, *arguments)
            assert y.shape == (2, rows, n)
            assert_near(y, x.double() @ w.T, x.double().abs() @ w.T.abs(), k)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 1024])
def test_one_row_on_whole_blocks(isa, blocksize, nested):
    for blocks in (1, 2, 3, 5):
        n, k = 7, blocks * blocksize
        arguments, w = weight(n, k, blocksize, nested=nested)
        for dtype in DTYPES:
            x, bias = torch.randn(1, k).to(dtype), torch.randn(n)
            xd = x.double()
            y = linear_4bit(x, *arguments, bias)
            assert_near(y, xd @ w.T + bias.double(), xd.abs() @ w.T.abs() + bias.double().abs(), k)


@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [(129, 320, 33), (300, 1504, 40), (37, 1501, 25), (17, 2080, 9), (260, 257, 11), (16, 8192, 600), (520, 32, 100)],
)
def test_products_in_many_blocks(isa, n, k, rows):
    """More columns than a block, a deeper sum than a panel, more rows than are packed at once; aligned or not."""
    arguments, w = weight(n, k, nested=True)
    for dtype in DTYPES:
        x = torch.randn(rows, k).to(dtype).requires_grad_()
        y = linear_4bit(x, *arguments, torch.zeros(n))
        xd = x.detach().double()
        assert_near(y.detach(), xd @ w.T, xd.abs() @ w.T.abs(), k)
        dy = torch.randn(rows, n).to(dtype)
        y.backward(dy)
        assert_near(x.grad, dy.double() @ w, dy.double().abs() @ w.abs(), n)


def test_strided_inputs():
    arguments, w = weight(24, 64)
    for rows in (3, 40):
        x = torch.randn(64, rows).T
        assert_near(linear_4bit(x, *arguments), x.double() @ w.T, x.double().abs() @ w.T.abs(), 64)
        x = torch.randn(rows, 64, requires_grad=True)
        linear_4bit(x, *arguments).sum().backward()  # a dy of stride 0
        ones = torch.ones(rows, 24).double()
        assert_near(x.grad, ones @ w, ones @ w.abs(), 24)


def test_threads_have_workspaces_of_their_own():
    problems = [weight(64, 96) for _ in range(4)]
    failures = []

    def work(arguments, w):
        for _ in range(30):
            x = torch.randn(40, 96, requires_grad=True)
            y = linear_4bit(x, *arguments)
            y.backward(torch.ones_like(y))
            exact = x.detach().double() @ w.T
            if (y.detach() - exact).abs().max() > 1e-3 or (x.grad - w.sum(0)).abs().max() > 1e-3:
                failures.append(1)

    threads = [threading.Thread(target=work, args=p) for p in problems]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_repeats_bit_for_bit_and_for_any_number_of_threads():
    arguments, _ = weight(700, 576)
    before = torch.get_num_threads()
    for rows in (3, 150):
        x = torch.randn(rows, 576, requires_grad=True)
        try:
            results = []
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                y = linear_4bit(x, *arguments)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
        finally:
            torch.set_num_threads(before)
        for y, dx in results:
            assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


@pytest.mark.parametrize(("rows", "k"), [(769, 1088), (385, 4160), (6155, 64)])
def test_products_in_chunks_of_rows(isa, rows, k):
    """More rows than the 384, or the 1.5 MB of them, that are multiplied at a time."""
    if isa == "scalar" and rows * k > 10**6:
        pytest.skip("slow, and the same code")
    arguments, w = weight(16, k)
    x, dy = torch.randn(rows, k, requires_grad=True), torch.randn(rows, 16)
    y = linear_4bit(x, *arguments)
    y.backward(dy)
    xd, dyd = x.detach().double(), dy.double()
    assert_near(y.detach(), xd @ w.T, xd.abs() @ w.T.abs(), k)
    assert_near(x.grad, dyd @ w, dyd.abs() @ w.abs(), 16)


@pytest.mark.parametrize("rows", [1, 40])
def test_operator_contract(rows):
    arguments, _ = weight(16, 64, nested=True)
    x = torch.randn(rows, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.pyqlora.linear_4bit, (x, *arguments, torch.randn(16, requires_grad=True)))
    torch.library.opcheck(
        torch.ops.pyqlora.linear_4bit_backward, (torch.randn(rows, 16, requires_grad=True), *arguments)
    )


def test_second_derivative():
    arguments, w = weight(8, 32)
    x = torch.randn(4, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(linear_4bit(x, *arguments).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    exact = 2 * torch.ones(4, 32).double() @ (w.T @ w)
    torch.testing.assert_close(second.double(), exact, rtol=1e-4, atol=1e-3)


def test_compiles_whole():
    arguments, _ = weight(16, 64)

    def f(x):
        return torch.nn.functional.silu(linear_4bit(x, *arguments)).sum()

    x = torch.randn(40, 64, requires_grad=True)
    f(x).backward()
    eager, x.grad = x.grad, None
    torch.compile(f, fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, eager)


def test_inference_mode_and_training_after_it():
    arguments, w = weight(16, 64)
    with torch.inference_mode():
        linear_4bit(torch.randn(40, 64), *arguments)
    x = torch.randn(40, 64, requires_grad=True)
    linear_4bit(x, *arguments).sum().backward()
    torch.testing.assert_close(x.grad.double(), w.sum(0).expand(40, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_errors_name_the_argument(rows):
    arguments, _ = weight(16, 64)
    packed, absmax, *rest = arguments

    def fails(message, x, *a):
        with pytest.raises(ValueError, match=message):
            linear_4bit(x, *a)

    x = torch.randn(rows, 64)
    fails(r"linear_4bit: x: expected a last dimension of 64, got shape \[.*32\]", torch.randn(rows, 32), *arguments)
    fails("linear_4bit: x: expected float32, float16 or bfloat16, got torch.int64", x.long(), *arguments)
    fails(r"linear_4bit: shape: expected \[N, K\], both positive, got \[16, 0\]", x[:, :0], *arguments[:-1], [16, 0])
    fails("packed: expected 512 elements, got 511", x, packed[1:], absmax, *rest)
    fails("absmax: expected 16 elements, got 15", x, packed, absmax[1:].contiguous(), *rest)
    fails("blocksize: expected a power of two from 32 to 4096, got 48", x, *arguments[:6], 48, *arguments[7:])
    fails("quant_type: expected 'nf4' or 'fp4', got 'int4'", x, *arguments[:7], "int4", [16, 64])


def test_bias_of_the_wrong_size():
    arguments, _ = weight(16, 64)
    with pytest.raises(ValueError, match="linear_4bit: bias: expected 16 elements, got 15"):
        linear_4bit(torch.randn(1, 64), *arguments, torch.randn(15))
