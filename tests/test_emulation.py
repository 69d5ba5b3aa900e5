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
    command = [sys.executable, "-m", "pytest", "--backend", "emulated_asan", "-k", "emulated_asan", TESTS / "ops"]
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
