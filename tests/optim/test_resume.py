"""Stop after a step, save, continue in another process: the losses are those of the run that was not stopped."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
import pyqlora.optim as optim
from pyqlora.nn import Linear4bit

name, first, last, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(0)
base = Linear4bit(96, 64, quant_type="nf4").to("cpu")
a, b = torch.nn.Parameter(torch.randn(96, 96) * 0.1), torch.nn.Parameter(torch.randn(96, 96) * 0.1)
small = torch.nn.Parameter(torch.zeros(96))
factory = getattr(optim, name)
extra = {"momentum": 0.9} if "SGD" in name or "LARS" in name else {}
optimizer = factory([{"params": [a, b]}, {"params": [small], "lr": 3e-3}], lr=1e-2, **extra)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
if first:
    saved = torch.load(path, weights_only=True)
    with torch.no_grad():
        for p, value in zip((a, b, small), saved["params"]):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
for step in range(first, last):
    for part in range(2):  # two micro-batches
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(10 * step + part))
        loss = base(torch.tanh(x @ a) @ b + small).square().mean()
        loss.backward()
    torch.nn.utils.clip_grad_norm_([a, b, small], 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()
    print(step, loss.item().hex())
params = [p.detach() for p in (a, b, small)]
torch.save({"params": params, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, path)
"""


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "LARS"])
def test_a_resumed_run_repeats_bit_for_bit(name, tmp_path):
    def losses(first, last, path):
        command = [sys.executable, "-c", SCRIPT, name, str(first), str(last), str(tmp_path / path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    whole = losses(0, 6, "whole")
    assert losses(0, 3, "half") + losses(3, 6, "half") == whole
    assert len(set(whole)) == 6
