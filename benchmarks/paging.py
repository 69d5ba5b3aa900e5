"""`python -m benchmarks.paging NAME [--millions M] [--steps N]`: steps of an optimizer whose state need not fit memory.

Run it under a limit and without one; under a limit only the paged optimizers finish if state is what does not fit:

    systemd-run --scope -p MemoryMax=900M -p MemorySwapMax=0 python -m benchmarks.paging PagedAdamW32bit

Prints wall and CPU milliseconds a step (medians) and how much of the process is resident at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import pyqlora.optim

PIECE = 4_000_000  # parameters in one tensor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paging")
    parser.add_argument("name", help="an optimizer of pyqlora.optim")
    parser.add_argument("--millions", type=int, default=60, help="of parameters, at 8 bytes each beside the state")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--page-dir", type=Path, help="where paged states live")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ps = [torch.nn.Parameter(torch.ones(PIECE)) for _ in range(arguments.millions * 1_000_000 // PIECE)]
    for p in ps:
        p.grad = torch.full_like(p, 1e-3)
    place = {"page_dir": arguments.page_dir} if arguments.page_dir else {}
    optimizer = getattr(pyqlora.optim, arguments.name)(ps, **place)
    optimizer.step()
    wall, cpu = [], []
    for _ in range(arguments.steps):
        before = time.perf_counter(), time.process_time()
        optimizer.step()
        wall.append((time.perf_counter() - before[0]) * 1e3)
        cpu.append((time.process_time() - before[1]) * 1e3)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)) / 1e6
    print(
        f"{arguments.name}: {statistics.median(wall):.0f} ms wall, {statistics.median(cpu):.0f} ms CPU a step; "
        f"{state:.0f} MB of state, {resident:.0f} MB resident; parameters end at {ps[-1][0].item():.6f}"
    )


if __name__ == "__main__":
    main()
