import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pyqlora.ops import paged
from pyqlora.ops.paged import page_directory, paged_zeros

SPECS = [((3, 5), torch.float32), ((4097,), torch.uint8), ((0, 2), torch.float32), ((), torch.float32)]


@pytest.fixture
def disk():
    """A directory that is no RAM disk."""
    for parent in (tempfile.gettempdir(), "/var/tmp", Path.home(), "."):
        with tempfile.TemporaryDirectory(dir=parent) as name:
            if paged._ram_disk(Path(name)) is None:
                yield Path(name)
                return
    pytest.skip("no directory on a disk")


def mapping(tensor):
    """The line of /proc/self/maps that holds the tensor's first byte."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line


def test_zeros_of_any_shape_and_dtype_in_one_nameless_file(disk):
    tensors = paged_zeros(SPECS, disk)
    assert [(tuple(t.shape), t.dtype) for t in tensors] == SPECS
    for t in tensors:
        assert not t.any() and t.data_ptr() % 64 == 0
        t.fill_(1)
    assert all(t.all() for t in tensors)
    lines = [mapping(t) for t in tensors if t.numel()]
    assert all("rw-s" in line and str(disk) in line and line.endswith("(deleted)") for line in lines)
    assert len({line.split()[4] for line in lines}) == 1
    assert not list(disk.iterdir())


def test_pages_go_with_the_last_tensor(disk):
    first, second = paged_zeros([((4096,), torch.float32)] * 2, disk)
    del first
    assert str(disk) in mapping(second)
    del second
    assert str(disk) not in Path("/proc/self/maps").read_text()


def test_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PYQLORA_PAGE_DIR", raising=False)
    assert page_directory() == Path(tempfile.gettempdir())
    monkeypatch.setenv("PYQLORA_PAGE_DIR", str(tmp_path))
    assert page_directory() == tmp_path
    assert page_directory("/") == Path("/") or os.geteuid()
    with pytest.raises(ValueError, match=re.escape("got '/nowhere': name one with page_dir=... or PYQLORA_PAGE_DIR")):
        page_directory("/nowhere")


def test_full_disk_is_an_error_before_anything_is_written(monkeypatch, disk):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"paged states need 8.0 MB in .* MB free: name another") as error:
        paged_zeros([((2_000_000,), torch.float32)], disk)
    assert error.value.errno == errno.ENOSPC


def test_ram_disk_warns_once():
    if not os.access("/dev/shm", os.W_OK) or paged._ram_disk(Path("/dev/shm")) is None:
        pytest.skip("no RAM disk at /dev/shm")
    paged._warn_if_ram.cache_clear()
    with pytest.warns(UserWarning, match="paged optimizer states in /dev/shm, which is a tmpfs, that is RAM") as record:
        paged_zeros(SPECS, "/dev/shm")
        paged_zeros(SPECS, "/dev/shm")
    assert len(record) == 1


# Private memory is limited to what the process has plus half of the states; shared file mappings do not count in it.
OUT_OF_MEMORY = """
import resource, sys, torch
import pyqlora.optim as optim
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.ones(8_000_000))
p.grad = torch.full_like(p, 0.5)
optimizer = getattr(optim, sys.argv[1])([p], page_dir=sys.argv[2])
warm = torch.nn.Parameter(torch.ones(10))
warm.grad = torch.ones(10)
optim.AdamW([warm]).step()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 32_000_000,) * 2)
try:
    optimizer.step()
except (RuntimeError, MemoryError) as error:
    sys.exit(f"out of memory: {error}")
print("finished", p[0].item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_states_beyond_the_memory_limit(disk):
    def run(name):
        script = [sys.executable, "-c", OUT_OF_MEMORY, name, str(disk)]
        return subprocess.run(script, capture_output=True, text=True)

    plain, paged_run = run("AdamW32bit"), run("PagedAdamW32bit")
    assert plain.returncode == 1 and "out of memory" in plain.stderr
    assert paged_run.returncode == 0 and paged_run.stdout.startswith("finished 0.99"), paged_run.stderr
