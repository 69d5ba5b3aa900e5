"""linear_dense against float64: sizes around a vector's and four lines, dtypes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops.linear_dense import MAX_ROWS, linear_dense, serves

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (2, 7), (3, 8), (4, 9), (5, 16), (7, 33), (8, 64), (1000, 31), (513, 576)]  # N, K
LANES = {"scalar": 1, "avx2": 8, "avx512": 16}  # sums side by side


def inputs(rows, n, k, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=g).to(dtype) for size in ((rows, k), (n, k), (n,))]


def compare(isa, x, weight, bias=None):
    """Against float64: float32 sums of K / lanes products, of the lanes and the rest, and the rounding to the dtype."""
    y = linear_dense(x, weight, bias)
    wide = [t.double() for t in (x, weight, torch.zeros(len(weight)) if bias is None else bias)]
    exact, size = wide[0] @ wide[1].T + wide[2], wide[0].abs() @ wide[1].abs().T + wide[2].abs()
    steps = x.shape[-1] / LANES[isa] + 2 * LANES[isa]
    narrow = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2.0**-24 * steps * size + narrow * exact.abs()).all()


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(isa, sizes, rows):
    compare(isa, *inputs(rows, *sizes))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(isa, dtype, rows):
    compare(isa, *inputs(rows, 101, 67, dtype))
    compare(isa, *inputs(rows, 101, 67, dtype)[:2])


def test_is_as_near_to_float64_as_torch():
    x, weight, _ = inputs(1, 4096, 576)
    exact = x.double() @ weight.double().T
    ours, theirs = (
        (y.double() - exact).square().mean().sqrt()
        for y in (linear_dense(x, weight), torch.nn.functional.linear(x, weight))
    )
    assert ours <= 1.5 * theirs


def test_nan_and_infinity_stay_where_they_are(isa):
    x, weight, bias = inputs(2, 9, 20)
    weight[3, 19], weight[5, 0], bias[7] = torch.nan, torch.inf, torch.inf
    y = linear_dense(x, weight, bias)
    assert (y.isfinite() == torch.tensor([i not in (3, 5, 7) for i in range(9)])).all()
    x[1, 2] = torch.nan
    y = linear_dense(x, weight, bias)
    assert y[1].isnan().all() and y[0].isnan().sum() == 1


def test_shapes_strides_and_nothing():
    x, weight, bias = inputs(4, 11, 10)
    want = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear_dense(x.view(2, 1, 2, 10), weight, bias), want.view(2, 1, 2, 11))
    torch.testing.assert_close(linear_dense(x[0], weight, bias), want[0])
    torch.testing.assert_close(linear_dense(x.T.contiguous().T, weight.T.contiguous().T, bias), want)
    torch.testing.assert_close(linear_dense(x, weight, bias.repeat_interleave(2)[::2]), want)
    assert linear_dense(x[:0], weight).shape == (0, 11)
    assert linear_dense(x, weight[:0]).shape == (4, 0)


def test_the_same_bits_for_any_number_of_threads_and_rows():
    x, weight, bias = inputs(MAX_ROWS, 5001, 130)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [torch.cat([linear_dense(rows, weight, bias) for rows in x.split(n)]) for n in range(1, 5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@torch.no_grad()
def test_what_it_serves():
    x, weight, _ = inputs(MAX_ROWS, 6, 8)
    assert serves(x, weight) and serves(x[0], weight) and serves(x.half(), weight.half())
    assert not serves(x.double(), weight.double()) and not serves(x, weight.bfloat16())
    assert not serves(torch.cat([x, x]), weight) and not serves(x[:, :7], weight) and not serves(x[0, 0], weight)
    assert not serves(x, weight[0]) and not serves(x, weight.T.contiguous().T)
    assert not serves(x.to("meta"), weight.to("meta"))
    with torch.enable_grad():
        assert not serves(x, weight)
    with torch.autocast("cpu"):
        assert not serves(x, weight)
    _C.cpu.set_isa("scalar")
    try:
        assert not serves(x, weight)
    finally:
        _C.cpu.set_isa("")


def test_what_it_refuses():
    x, weight, bias = inputs(4, 6, 8)
    for a, b in ((x[:, :7], weight), (torch.cat([x, x]), weight), (x, weight[0])):
        message = rf"linear_dense: .* up to 4 rows .* got x \[{', '.join(map(str, a.shape))}\], weight \["
        with pytest.raises(ValueError, match=message):
            linear_dense(a, b)
    with pytest.raises(ValueError, match="linear_dense: x: expected float32 or float16 or bfloat16, got another dtype"):
        linear_dense(x.double(), weight.double())
    with pytest.raises(ValueError, match="linear_dense: weight: expected float32, got float16"):
        linear_dense(x, weight.half())
    with pytest.raises(ValueError, match="linear_dense: bias: expected 6 elements, got 5"):
        linear_dense(x, weight, bias[:5])
    with pytest.raises(ValueError, match="linear_dense: bias: expected float32, got bfloat16"):
        linear_dense(x, weight, bias.bfloat16())
    y = torch.empty(4, 6)
    for arguments, message in [
        ((x, weight, None, y, 5), "x: expected up to 4 rows of k, at least 1, got 32 elements and a k of 5"),
        ((x, weight, None, y, 4), "x: expected up to 4 rows of k, at least 1, got 32 elements and a k of 4"),
        ((x, weight, None, y, 0), "x: expected up to 4 rows of k, at least 1, got 32 elements and a k of 0"),
        ((x, weight[:, :7].contiguous(), None, y, 8), "weight: expected rows of k, 8, got 42 elements"),
        ((x, weight, None, y[:3], 8), "y: expected 24 elements, got 18"),
        ((x, weight, None, y.half(), 8), "y: expected float32, got float16"),
    ]:
        with pytest.raises(ValueError, match=f"linear_dense: {message}"):
            _C.cpu.linear_dense(*arguments, 1)
