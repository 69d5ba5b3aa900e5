import pytest
import torch
from twins import parameters, set_gradients

import pyqlora.optim as optim

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW32bit", "PagedAdamW32bit"])
def test_32bit_states_equal_bitsandbytes_bit_for_bit(name, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(dtype), parameters(dtype)
    a = getattr(optim, name)(ours, lr=1e-2, weight_decay=0.1)
    b = getattr(bnb.optim, name.removeprefix("Paged"))(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(20):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        for key in ("state1", "state2"):
            assert torch.equal(a.state[p][key], b.state[q][key])
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)


def test_against_torch():
    ours, theirs = parameters(), parameters()
    a = optim.AdamW(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(20):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 32])
def test_paged_equals_plain_bit_for_bit(bits, dtype):
    plain, paged = parameters(dtype), parameters(dtype)
    a = getattr(optim, f"AdamW{bits}bit")(plain, lr=1e-2)
    b = getattr(optim, f"PagedAdamW{bits}bit")(paged, lr=1e-2)
    for step in range(5):
        set_gradients(step, plain, paged)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, paged, strict=True))
    for p, q in zip(plain, paged, strict=True):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b.state[q][k])) for k, v in a.state[p].items())
