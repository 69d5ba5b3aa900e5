"""Every rule against bitsandbytes' CPU backend, and against float64."""

import math

import pytest
import torch
from twins import parameters, set_gradients

import pyqlora.optim as optim
from pyqlora import _C
from pyqlora.optim.states import encode
from pyqlora.quant_maps import create_dynamic_map

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAMILIES = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {},
    "AdEMAMix": {"betas": (0.9, 0.999, 0.99), "t_alpha": 10, "t_beta3": 10},
    "Lion": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1},
    "Adagrad": {"weight_decay": 0.1},
    "LAMB": {"weight_decay": 0.1},
    "LARS": {"momentum": 0.9, "weight_decay": 0.1},
}


@pytest.fixture(params=_C.cpu.supported_isas())
def isa(request):
    _C.cpu.set_isa(request.param)
    yield request.param
    _C.cpu.set_isa("")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_32bit_equals_bitsandbytes(family, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(dtype), parameters(dtype)
    # Its AdEMAMix32bit keeps one average too few; its AdEMAMix is right.
    a = getattr(optim, family)(ours, lr=1e-2, **FAMILIES[family])
    b = getattr(bnb.optim, family)(theirs, lr=1e-2, **FAMILIES[family])
    for step in range(12):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    coupled = family in ("SGD", "RMSprop", "Adagrad", "LARS")  # p's rounding enters the states
    for p, q in zip(ours, theirs, strict=True):
        for key in a.state[p]:
            x, y = torch.as_tensor(a.state[p][key]), torch.as_tensor(b.state[q][key])
            if coupled or key == "unorm_vec":
                torch.testing.assert_close(x.float(), y.float(), rtol=1e-4, atol=16 * torch.finfo(dtype).eps)
            else:
                assert torch.equal(x, y), key
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", FAMILIES)
def test_8bit_codes_equal_bitsandbytes_up_to_its_table(family):
    """One step from equal states. Ours are the nearest codes, as in its CUDA kernels.

    Its CPU kernel looks codes up in a table of 65,536 bins over [-1, 1], so its choice may be one code or one bin off.
    """
    bnb = pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(), parameters()
    a = getattr(optim, f"{family}8bit")(ours, lr=1e-2, **FAMILIES[family])
    b = getattr(bnb.optim, f"{family}8bit")(theirs, lr=1e-2, **FAMILIES[family])
    for step in range(8):
        set_gradients(step, ours, theirs)
        b.step()
        a.step()
        for p, q in zip(ours, theirs, strict=True):
            mine, peer = a.state[p], b.state[q]
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            for key, signed in (("1", True), ("2", False)):
                if f"absmax{key}" not in mine:
                    continue
                torch.testing.assert_close(mine[f"absmax{key}"], peer[f"absmax{key}"], rtol=2e-6, atol=0)
                qmap = create_dynamic_map(signed)
                x, y = qmap[mine[f"state{key}"].long()], qmap[peer[f"state{key}"].long()]
                same_bin = (x - y).abs() <= 2 / 65535
                neighbours = (mine[f"state{key}"].int() - peer[f"state{key}"].int()).abs() <= 1
                assert (same_bin | neighbours).all()
                assert (x == y).float().mean() > 0.9
                for name in ("state", "absmax"):
                    mine[name + key].copy_(peer[name + key])
            with torch.no_grad():
                p.copy_(q)


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_is_to_the_nearest_entry(isa, signed):
    """Through Lion with b2 = 0 (signed) and Adam with b2 = 0 (unsigned): the new state is g or g^2."""
    qmap = create_dynamic_map(signed)
    middles = ((qmap[1:].double() + qmap[:-1].double()) / 2).float()
    ulp = torch.tensor(2.0)
    edges = torch.cat([qmap, middles, torch.nextafter(middles, ulp), torch.nextafter(middles, -ulp)])
    random = torch.rand(3000, generator=torch.Generator().manual_seed(0)) ** 6 * (1 if not signed else -1)
    values = torch.cat([edges, random, torch.zeros(7)])
    values = torch.cat([values, values.new_zeros(-len(values) % 255)]).view(-1, 255)
    blocks = torch.cat([values.new_ones(len(values), 1), values], 1)
    p = torch.nn.Parameter(torch.zeros(blocks.numel()))
    if signed:
        p.grad = blocks.flatten().clone()
        optimizer = optim.Lion8bit([p], betas=(0.0, 0.0), min_8bit_size=1)
        expected = p.grad
    else:
        p.grad = blocks.flatten().sqrt()
        optimizer = optim.Adam8bit([p], betas=(0.0, 0.0), min_8bit_size=1)
        expected = p.grad * p.grad
    optimizer.step()
    key = "1" if signed else "2"
    codes, absmax = encode(expected, qmap)
    assert torch.equal(optimizer.state[p]["absmax" + key], absmax)
    assert torch.equal(optimizer.state[p]["state" + key], codes)
    distance = (expected.double()[:, None] - qmap.double()).abs()
    assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.min(1).values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 32])
def test_instruction_sets_and_threads_agree_bit_for_bit(family, bits):
    results = []
    threads = torch.get_num_threads()
    for name in _C.cpu.supported_isas():
        for count in (1, 3):
            _C.cpu.set_isa(name)
            torch.set_num_threads(count)
            for dtype in DTYPES:
                ps = parameters(dtype, [(301, 177), (33,)])
                optimizer = getattr(optim, f"{family}{bits}bit")(ps, lr=1e-2, min_8bit_size=16, **FAMILIES[family])
                for step in range(3):
                    set_gradients(step, ps)
                    optimizer.step()
                state = [v for p in ps for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
                results.append((dtype, [*ps, *state]))
    torch.set_num_threads(threads)
    _C.cpu.set_isa("")
    for dtype, tensors in results:
        first = next(t for d, t in results if d == dtype)
        assert all(torch.equal(x, y) for x, y in zip(first, tensors, strict=True))


def test_adamw_against_float64():
    (p,) = parameters(shapes=[(1000,)])
    optimizer = optim.AdamW(p_list := [p], lr=1e-2, weight_decay=0.1)
    x, m, v = p.detach().double(), torch.zeros(1000).double(), torch.zeros(1000).double()
    for t in range(1, 21):
        set_gradients(t, p_list)
        optimizer.step()
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c1, c2 = 1 - 0.9**t, math.sqrt(1 - 0.999**t)
        x = x * (1 - 1e-2 * 0.1) - 1e-2 * (m / c1) / (v.sqrt() / c2 + 1e-8)
    # Each of 20 steps rounds p once (half an ulp of |p| < 4) and its update of lr to a few ulps.
    torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=20 * (2**-23 + 1e-2 * 2**-20))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "RMSprop", "Adagrad", "SGD", "Lion"])
def test_a_bad_gradient_harms_only_its_element_of_the_step(family, bits, bad, isa):
    arguments = {"momentum": 0.9} if family == "SGD" else {}
    ours, clean = parameters(shapes=[(5000,)]), parameters(shapes=[(5000,)])
    a = getattr(optim, f"{family}{bits}bit")(ours, lr=1e-2, **arguments)
    b = getattr(optim, f"{family}{bits}bit")(clean, lr=1e-2, **arguments)
    for step in range(4):
        set_gradients(step, ours, clean)
        clean[0].grad[7] = 0.0
        ours[0].grad[7] = 0.0 if step != 1 else bad
        if bad == 1e30 and family in ("SGD", "Lion"):
            ours[0].grad[7] = 0.0  # finite there
        a.step()
        b.step()
    mask = torch.arange(5000) != 7
    assert torch.equal(ours[0][mask], clean[0][mask])
    assert ours[0].isfinite().all()
