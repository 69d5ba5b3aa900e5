"""The GPU kernels of linear_4bit, called directly, against float64."""

from __future__ import annotations

import pytest
import reference
import torch

from pyqlora.ops import linear_4bit_cuda

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one unit in the last place


@pytest.fixture
def gpu(backend):
    if backend.name == "cpu":
        pytest.skip("kernels of the GPU")
    return backend


def weight_of(n, k, blocksize, quant_type="nf4", nested=False, seed=0):
    """A packed weight of random bytes with random scales, and its values in float64."""
    random = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // blocksize)
    packed = torch.randint(256, ((n * k + 1) // 2, 1), generator=random, dtype=torch.uint8)
    if nested:
        absmax = torch.randint(256, (blocks,), generator=random, dtype=torch.uint8)
        nested_absmax = torch.rand(-(-blocks // 256), generator=random)
        nested_code = torch.rand(256, generator=random).sort().values
        constants = absmax, nested_absmax, nested_code, torch.tensor(0.25), 256
        scales = reference.scales(*constants)
    else:
        scales = 0.1 + torch.rand(blocks, generator=random)
        constants = scales, None, None, None, 256
    values = reference.dequantize_4bit(packed, scales, blocksize, quant_type, (n, k), torch.float64)
    return (packed, *constants, blocksize, quant_type), values


def to(device, weight):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in weight)


def check(kernel, gpu, dtype, m, n, k, blocksize, quant_type="nf4", nested=False, bias=True, decoding=0.0):
    """Compare with float64; `decoding` is the error of a weight before it is multiplied."""
    weight, values = weight_of(n, k, blocksize, quant_type, nested)
    random = torch.Generator().manual_seed(1)
    x = torch.randn((m, k), generator=random).to(dtype)
    b = torch.randn(n, generator=random).to(dtype) if bias else None
    y = kernel(x.to(gpu.device), to(gpu.device, weight), [n, k], None if b is None else b.to(gpu.device))
    assert y.dtype == dtype and y.shape == (m, n)
    expected = x.double() @ values.T
    if bias:
        expected += b.double()
    # float32 sums of at most some dozen terms in a row, then one rounding to the output.
    products = x.double().abs() @ values.abs().T
    bound = products * (decoding + 64 * 2**-24) + expected.abs() * ROUNDING[dtype] + 2**-24
    error = (y.cpu().double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound at {(error / bound).argmax()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9])
def test_simt_rows(gpu, dtype, m):
    check(linear_4bit_cuda.simt, gpu, dtype, m, 5, 320, 64)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (4, 33), (7, 65), (5, 127), (2, 264), (9, 300)])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_simt_shapes(gpu, n, k, blocksize, nested):
    check(linear_4bit_cuda.simt, gpu, torch.float32, 2, n, k, blocksize, nested=nested, bias=n % 2 == 1)


def test_simt_fp4(gpu):
    check(linear_4bit_cuda.simt, gpu, torch.float16, 3, 6, 100, 32, "fp4")


def test_simt_takes_misaligned_tensors(gpu):
    weight, values = weight_of(4, 64, 32)
    packed = torch.cat([weight[0][:1], weight[0]])[1:].to(gpu.device)
    x = torch.arange(65.0)[1:].view(1, 64).to(gpu.device)
    y = linear_4bit_cuda.simt(x, (packed, *to(gpu.device, weight)[1:]), [4, 64], None)
    torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ values.T, rtol=1e-5, atol=1e-3)


def test_no_rows(gpu):
    weight, _ = weight_of(4, 64, 64)
    x = torch.empty((0, 64), device=gpu.device)
    assert linear_4bit_cuda.simt(x, to(gpu.device, weight), [4, 64], None).shape == (0, 4)
