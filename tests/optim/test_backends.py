"""The optimizer classes on every backend: a training run gives the CPU's numbers."""

import pytest
import torch

import pyqlora.optim as optim
from pyqlora.ops import backend as dispatch

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


def train(device, name, arguments, dtype, steps=3):
    """Losses, parameters and states of a small network, in two groups of parameters, one of them strided."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 3)).to(device, dtype)
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().T.contiguous().T)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = getattr(optim, name)(groups, lr=1e-2, min_8bit_size=150, **arguments)
    x, y = torch.randn(20, 33).to(device, dtype), torch.randn(20, 3).to(device, dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    parameters = list(model.parameters())
    states = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return losses, [t.detach().cpu().clone() for t in parameters + states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "Paged"])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_gives_the_cpus_numbers(backend, family, bits, prefix, dtype):
    if backend.name in ("emulated_reverse", "emulated_checked") and (prefix or dtype is torch.float32):
        pytest.skip("the same kernels as without paging, and in bfloat16")
    run = f"{prefix}{family}{bits}bit", FAMILIES[family], dtype
    losses, tensors = train(backend.device, *run)
    with dispatch.override(None):
        expected_losses, expected = train(torch.device("cpu"), *run)
    assert len(tensors) == len(expected)
    if backend.name == "cuda":  # the gradients are torch's on another device: rounded differently
        assert losses == pytest.approx(expected_losses, rel=16 * torch.finfo(dtype).eps)
        return
    assert losses == expected_losses
    assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))
