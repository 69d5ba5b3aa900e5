"""What the emulation must notice: planted faults in the kernels, and what the sanitizers say about all of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import emulation
import mutation
import pytest
import torch

from pyqlora.ops import backend as dispatch
from pyqlora.ops import quantize as ops

TESTS = emulation.ROOT / "tests"

# A few of all faults, one of each kind; `python tests/mutation.py` plants them all.
SAMPLE = [
    ("quantize", "missing barrier before the warps' maxima"),
    ("quantize", "misaligned load"),
    ("quantize", "tail read one too far"),
    ("quantize", "scale of another block"),
    ("linear_4bit", "swapped nibbles"),
    ("linear_4bit_mma", "wrong lane's rows"),
    ("linear_4bit_mma", "splits write over each other"),
]


@pytest.mark.parametrize("kernel", mutation.KERNELS)
def test_faults_can_be_planted(kernel):
    for fault in mutation.faults(kernel):
        mutation.changed(kernel, fault)


@pytest.mark.parametrize(("kernel", "what"), SAMPLE)
def test_planted_fault_is_noticed(tmp_path, kernel, what):
    """The emulated tests fail on a kernel with this one change."""
    (fault,) = (f for f in mutation.faults(kernel) if f.what == what)
    mutation.plant(kernel, fault, tmp_path)
    assert mutation.killer(kernel, tmp_path)


def test_sanitizers():
    """The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python that has them preloaded."""
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"g++ has no {name}")
        libraries.append(found)
    emulation.build("asan")
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "--backend", "emulated_asan", "-k", "emulated_asan or test_paged_cuda"]
    command += [TESTS / "ops", TESTS / "test_launches.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.fixture(params=["fast", "checked"])
def device(request):
    return emulation.device(request.param)


def test_a_failed_launch_says_what_and_where(device):
    """Host memory given to a kernel is an error, and the device works again afterwards."""
    x, packed, absmax = torch.ones(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    with pytest.raises(RuntimeError, match="quantize_4bit: CUDA error cudaErrorLaunchFailure: a kernel argument"):
        device.module.cuda.quantize_4bit(x, packed, absmax, 64, "nf4", 0)
    device.module.reset()
    with dispatch.override(device):
        assert ops.quantize_4bit(x, 64, "nf4")[1].item() == 1.0


def test_uninitialised_memory_is_noticed():
    module = emulation.device("checked").module
    pointers = [module.malloc(n) for n in (256, 32, 4)]
    x, packed, absmax = (
        torch.frombuffer((ctypes.c_uint8 * n).from_address(p), dtype=torch.uint8).view(dtype)
        for p, n, dtype in zip(pointers, (256, 32, 4), (torch.float32, torch.uint8, torch.float32), strict=True)
    )
    with pytest.raises(RuntimeError, match="read of uninitialised device memory"):
        module.cuda.quantize_4bit(x, packed, absmax, 64, "nf4", 0)
    module.reset()
    for p in pointers:
        module.free(p)
    with pytest.raises(ValueError, match="free: not an allocation"):
        module.free(pointers[0])


class Probe:
    """The kernels of csrc/emulation/probes.cu on a build of the engine."""

    def __init__(self, build):
        self.module = emulation.device(build).module
        self.input = [3 * i % 251 for i in range(self.module.PROBE_INTS)]

    def __call__(self, name, misuse=0, uninitialised=False):
        """The output; what the kernel left alone is -1."""
        size = 4 * self.module.PROBE_INTS
        source, target = self.module.malloc(size), self.module.malloc(size)
        ints = ctypes.c_int32 * self.module.PROBE_INTS
        try:
            ints.from_address(source)[:] = self.input
            self.module.written_by_host(source, size // 2 if uninitialised else size)
            self.module.probe(name, misuse, source, target)
            return list(ints.from_address(target))
        finally:
            self.module.reset()
            self.module.free(source)
            self.module.free(target)


@pytest.fixture(params=["fast", "checked"])
def probe(request):
    return Probe(request.param)


@pytest.fixture(params=[("forward", "late"), ("reverse", "late"), ("forward", "early"), ("random", "early")], ids=str)
def scheduled(request, probe):
    """Under every order of threads and time of copies."""
    order, copies = request.param
    probe.module.set_order(order, 3)
    probe.module.set_copies(copies)
    yield probe
    probe.module.set_order("forward")
    probe.module.set_copies("late")


def test_barriers(scheduled):
    assert scheduled("barrier")[:128] == scheduled.input[127::-1]


def test_copies(scheduled):
    result, x = scheduled("copies"), scheduled.input
    assert result[:128] == [x[4 * (i ^ 1)] if i < 64 else 0 for i in range(128)]
    assert result[128:256] == [x[4 * (64 + (i ^ 1) % 64) + 1] for i in range(128)]


def test_matrices(scheduled):
    result = scheduled("matrices")
    halves = torch.tensor(scheduled.input[:128], dtype=torch.int32).view(torch.int16).view(4, 8, 8)
    for matrices, first in ((halves, 0), (halves.mT, 128)):
        expected = matrices.contiguous().view(torch.int32).view(4, 32).T  # lane, register
        assert result[first : first + 128] == expected.flatten().tolist()


def test_named_barriers(scheduled):
    result, x = scheduled("named_barriers"), scheduled.input
    assert result[:128] == x[63::-1] + x[127:63:-1]


def test_votes(scheduled):
    result, x = scheduled("votes"), scheduled.input[:128]
    total, any77, all_positive = sum(v % 2 for v in x), 77 in x, True
    for warp in range(4):
        lanes = x[32 * warp : 32 * warp + 32]
        ballot = sum(v % 2 << i for i, v in enumerate(lanes))
        some, every = lanes[3] % 2, all(v % 2 for v in lanes[16:])
        assert all(v & 0xFFFFFFFF == ballot for v in result[32 * warp : 32 * warp + 32])
        rest = some + 2 * every + 4 * any77 + 8 * all_positive + 16 * total
        assert result[128 + 32 * warp : 160 + 32 * warp] == [rest] * 32


def test_vectors(scheduled):
    x = scheduled.input
    assert scheduled("vectors") == [x[i // 4 * 4 + 3 - i % 4] for i in range(len(x))]


def test_dynamic_shared_memory(scheduled):
    assert scheduled("dynamic_shared")[:128] == scheduled.input[:128]


MISUSES = [  # what the checked build says of each misuse; "always": the fast build too
    ("barrier", 1, "data race in shared memory|read of uninitialised shared memory"),
    ("barrier", 2, "always: divergent __syncthreads"),
    ("barrier", 3, "data race in shared memory|read of uninitialised shared memory"),
    ("barrier", 4, "out-of-bounds shared write of 1 bytes"),
    ("barrier", 5, "read of uninitialised shared memory"),
    ("barrier", 6, "read of uninitialised device memory"),
    ("barrier", 7, "data race in device memory"),
    ("barrier", 8, "out-of-bounds device write of 4 bytes"),
    ("barrier", 9, "data race in device memory .* of block 0, then write by .* of block 1"),
    ("copies", 1, "read of shared memory .* before the wait for its cp.async"),
    ("copies", 2, "data race in shared memory|read of uninitialised shared memory|before the wait for its cp.async"),
    ("copies", 3, "write to shared memory .* before the wait for its cp.async"),
    ("copies", 4, "always: misaligned cp.async of 16 bytes"),
    ("copies", 5, "always: cp.async from outside of device memory"),
    ("copies", 6, "read of shared memory .* before the wait for its cp.async"),
    ("matrices", 1, "data race in shared memory"),
    ("matrices", 2, "always: ldmatrix of no aligned row of shared memory"),
    ("matrices", 3, "always: mma or ldmatrix with exited lanes"),
    ("named_barriers", 1, "data race in shared memory|read of uninitialised shared memory"),
    ("named_barriers", 2, "data race in shared memory|read of uninitialised shared memory"),
    ("named_barriers", 3, "data race in shared memory"),
    ("named_barriers", 4, "always: named barrier 1 of (128|96) threads meets one of (128|96)"),
    ("named_barriers", 5, "always: deadlock: no thread can run(.|\n)*at a named barrier"),
    ("votes", 1, "always: lane 0 is not in its own mask"),
    ("votes", 2, "always: warp collective mismatch|deadlock"),
    ("vectors", 1, "16-byte access at the misaligned address"),
    ("vectors", 2, "always: 16-byte access at the misaligned address"),
    ("vectors", 3, "always: 8-byte access at the misaligned address"),
    ("dynamic_shared", 1, "always: cudaErrorInvalidValue"),
    ("dynamic_shared", 2, "out-of-bounds shared write of 4 bytes"),
    ("dynamic_shared", 3, "always: cudaErrorInvalidValue"),
]


@pytest.mark.parametrize(("name", "misuse", "message"), MISUSES)
@pytest.mark.parametrize("copies", ["late", "early"])
def test_misuse_is_noticed(name, misuse, message, copies):
    message = message.removeprefix("always: ") if (always := message.startswith("always: ")) else message
    for build in ("checked", "fast") if always else ("checked",):
        probe = Probe(build)
        probe.module.set_copies(copies)
        try:
            with pytest.raises(RuntimeError, match=message):
                probe(name, misuse, uninitialised=(name, misuse) == ("barrier", 6))
        finally:
            probe.module.set_copies("late")


def test_a_forgotten_wait_shows_as_a_wrong_value():
    """In the fast build too, where the bytes arrive late."""
    probe = Probe("fast")
    assert probe("copies", 1) != probe("copies")
