"""The CPU kernels of lora_linear, called directly, against float64; dropout of all instruction sets against philox."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops import lora_linear_cpu as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = torch.tensor([0x1234_5678_9ABC_DEF0 >> 2])
# rows, rank, columns: one, few with ranks around the registers' widths, around a tile, around a block of 128, several
# blocks, deeper than a panel of 256
SHAPES = [
    (1, 1, 1),
    (1, 16, 576),
    (5, 31, 96),
    (8, 72, 40),
    (7, 3, 65),
    (9, 16, 64),
    (24, 8, 129),
    (33, 17, 300),
    (131, 64, 33),
    (600, 16, 40),
]


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def philox(seed: int, row: int, group: int) -> list[int]:
    """Philox4x32-10 as its paper has it, in Python's integers."""
    c, k, low = [group & 0xFFFFFFFF, group >> 32, row & 0xFFFFFFFF, row >> 32], [seed & 0xFFFFFFFF, seed >> 32], 1 << 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // low ^ c[1] ^ k[0], p1 % low, p0 // low ^ c[3] ^ k[1], p0 % low]
        k = [(k[0] + 0x9E3779B9) % low, (k[1] + 0xBB67AE85) % low]
    return c


def kept(rows: int, columns: int, dropout: float) -> torch.Tensor:
    """The mask: eight columns share a draw, 16 bits each."""
    mask = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            word = philox(SEED.item(), row, column // 8)[column % 8 // 2]
            mask[row, column] = (word >> 16 * (column % 2) & 0xFFFF) >= round(dropout * 65536)
    return mask


def dropped(x: torch.Tensor, dropout: float) -> torch.Tensor:
    y = torch.empty(x.shape)
    _C.cpu.lora_dropout(x, y, SEED, dropout, x.shape[-1], 1)
    return y.double()


def close(got, want, magnitude, terms):
    unit = torch.finfo(got.dtype).eps / 2
    bound = magnitude * terms * 2**-24 + want.abs() * unit + torch.finfo(got.dtype).smallest_normal * unit
    error = (got.double() - want).abs()
    assert (error <= bound * 1.01).all(), f"{(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 8, 63, 64, 65, 200])
def test_dropout_is_philox(isa, columns, dtype):
    x = rand(3, columns, dtype=dtype)
    mask = kept(3, columns, 0.3)
    for out in {dtype, torch.float32}:
        y = torch.empty(x.shape, dtype=out)
        _C.cpu.lora_dropout(x, y, SEED, 0.3, columns, 1)
        assert torch.equal(y, (x.to(out) * mask).to(out) + 0.0)


def test_dropout_far_from_the_first_row_and_group(isa):
    x = torch.ones(1, 1 << 18)
    assert torch.equal(dropped(x, 0.5)[0, -64:], kept_at(0, (1 << 18) - 64))
    x = torch.ones(70_000, 8)
    assert torch.equal(dropped(x, 0.5)[69_999], kept_at(69_999, 0)[:8])


def kept_at(row, first):
    words = [philox(SEED.item(), row, group) for group in range(first // 8, first // 8 + 8)]
    return torch.tensor(
        [float((w[i // 2] >> 16 * (i % 2) & 0xFFFF) >= 32768) for w in words for i in range(8)]
    ).double()


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_products_equal_float64(isa, dropout, dtype, factor):
    seed = SEED if dropout else None
    for m, r, k in SHAPES:
        x, a = rand(m, k, dtype=dtype), rand(r, k, dtype=factor)
        xd = dropped(x, dropout) if dropout else x.double()
        (s,) = kernels.down(x, [a], [0.5], seed, dropout)
        assert s.dtype == torch.float32
        close(s, 0.5 * xd @ a.double().T, 0.5 * xd.abs() @ a.double().abs().T, k + 2)

        s, b = rand(m, r), rand(k, r, dtype=factor)
        update = s.double() @ b.double().T
        update = dropped_of(update, dropout)
        y = rand(m, k, dtype=dtype)
        want = y.double() + update
        magnitude = s.double().abs() @ b.double().abs().T + y.double().abs()
        close(kernels.up(s, [b], y.clone(), seed, dropout), want, magnitude, r + 2)
        close(kernels.up(s, [b], y.clone(), seed, dropout, accumulate=False), update, magnitude, r + 2)

        dy = rand(m, k, dtype=dtype)
        ds, db = kernels.backward(dy, b, s, 0.7)
        assert (ds.dtype, db.dtype) == (torch.float32, factor)
        close(ds, 0.7 * dy.double() @ b.double(), 0.7 * dy.double().abs() @ b.double().abs(), k + 2)
        close(db, dy.double().T @ s.double(), dy.double().T.abs() @ s.double().abs(), m + 2)

        da = kernels.backward_a(x, a, s, seed, dropout)
        assert da.dtype == factor
        close(da, s.double().T @ xd, s.double().abs().T @ xd.abs(), m + 2)


def dropped_of(y, dropout):
    return y * dropped(torch.ones(y.shape), dropout) if dropout else y


def test_the_same_bits_for_any_number_of_threads(isa):
    x, a, dy = rand(300, 200), rand(16, 200), rand(300, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            (s,) = kernels.down(x, [a], [1.0], SEED, 0.1)
            results.append((s, *kernels.backward(dy, a.T, s, 1.0), kernels.up(s, [a.T], dy.clone(), SEED, 0.1)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_rows():
    x, a = torch.empty(0, 8), torch.ones(2, 8)
    (s,) = kernels.down(x, [a], [1.0])
    assert s.shape == (0, 2) and kernels.up(s, [torch.ones(5, 2)], torch.empty(0, 5)).shape == (0, 5)
    assert kernels.backward_a(x, a, s, None, 0.0).eq(0).all()


def test_serves():
    assert kernels.serves(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert not kernels.serves(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not kernels.serves(torch.ones(2, device="meta"))


def test_errors_name_the_argument():
    x, a, s, y = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 4), torch.ones(2, 6)
    b, one = torch.ones(6, 4), (None, None, 0.0)

    def fails(message, function, *arguments):
        with pytest.raises(ValueError, match=message):
            function(*arguments)

    down, up, backward = _C.cpu.lora_down, _C.cpu.lora_up, _C.cpu.lora_backward
    fails(
        "lora_down: x: expected float32 or float16 or bfloat16, got int64",
        down,
        x.long(),
        [a],
        8,
        [1.0],
        *one,
        s,
        None,
        1,
    )
    fails("lora_down: factors: expected one on a CPU, got 2", down, x, [a, a], 8, [1.0, 1.0], *one, s, None, 1)
    fails("lora_down: a: expected a multiple of 8 elements, got 4", down, x, [a[0, :4]], 8, [1.0], *one, s, None, 1)
    fails("lora_down: s: expected float32, got float16", down, x, [a], 8, [1.0], *one, s.half(), None, 1)
    tiles = torch.zeros(1, 3, dtype=torch.int32)
    fails("lora_up: tiles: expected None on a CPU, got a tensor", up, s, [b], 6, tiles, None, 0.0, y, True, 1)
    fails("lora_up: s: expected 8 elements, got 4", up, s[:1], [b], 6, *one, y, True, 1)
    fails(r"dropout: expected a probability in \[0, 1\), got 1", up, s, [b], 6, None, SEED, 1.0, y, True, 1)
    no_parts = (None, None, 6, 1)
    fails(
        "lora_backward: ds: expected float32, got bfloat16",
        backward,
        y,
        b,
        s,
        1.0,
        None,
        0.0,
        s.bfloat16(),
        b,
        False,
        *no_parts,
    )
    fails(
        "lora_backward: seed: expected None where there is b", backward, y, b, s, 1.0, SEED, 0.1, s, b, False, *no_parts
    )
