"""parallel_for, through the kernels that run on it: nesting in Python threads, forks, thread counts."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from pyqlora.ops.quantize import quantize_4bit


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_callers_in_several_python_threads():
    inputs = [torch.randn(1 << 18) for _ in range(4)]
    expected = [quantize_4bit(x, 64, "nf4") for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            result = quantize_4bit(inputs[i], 64, "nf4")
            if not all(torch.equal(a, b) for a, b in zip(result, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_the_threads_are_those_of_torch():
    def threads():
        return set(os.listdir("/proc/self/task"))

    torch.zeros(1 << 22).add_(1)  # starts them
    before = threads()
    assert len(before) >= 4
    for n in (1 << 18, 1 << 17, 1 << 18):  # work for four threads, for two, which leaves the others alive, for four
        quantize_4bit(torch.randn(n), 64, "nf4")
    assert threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    x = torch.randn(1 << 18)
    packed, _ = quantize_4bit(x, 64, "nf4")  # the parent's pool runs
    child = os.fork()
    if child == 0:
        try:
            # Compared by numpy: torch's own parallel operators may hang in a forked child.
            os._exit(0 if (quantize_4bit(x, 64, "nf4")[0].numpy() == packed.numpy()).all() else 1)
        finally:
            os._exit(2)
    deadline = threading.Timer(20, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    assert os.waitstatus_to_exitcode(status) == 0
