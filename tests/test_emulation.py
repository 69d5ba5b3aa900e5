"""What the emulation must notice: planted faults in the kernels, and what the sanitizers say about all of them."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch

from pyqlora.ops import backend as dispatch
from pyqlora.ops import quantize as ops

OPS = emulation.ROOT / "csrc" / "ops"
TESTS = emulation.ROOT / "tests"


def load_tests(name):
    """A test module as a library of checks."""
    spec = importlib.util.spec_from_file_location(f"checks_{name}", TESTS / "ops" / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantize_suite(backend):
    tests = load_tests("quantize")
    for blocksize, dtype in itertools.product((64, 4096), tests.DTYPES):
        tests.test_4bit(backend, blocksize, dtype, "fp4")
        tests.test_blockwise(backend, blocksize, dtype)
    for nested_blocksize in (64, 256):
        tests.test_nested_scales(backend, nested_blocksize, torch.bfloat16)
    tests.test_windows(backend)
    tests.test_strided_and_misaligned_inputs(backend)


SUITES = {"quantize": quantize_suite}

# Operation, what goes wrong, the line, what it becomes.
FAULTS = [
    ("quantize", "missing barrier", "    __syncthreads();\n    const int warps", "    const int warps"),
    ("quantize", "swapped nibbles", "word |= code << 4 * (i ^ 1);", "word |= code << 4 * i;"),
    ("quantize", "off-by-one tail", "base + i < n ? to_float", "base + i <= n ? to_float"),
    ("quantize", "misaligned load", "aligned(a.x.data, 16) && aligned(a.packed.data, 4)", "true"),
    ("quantize", "wrong scale block", "stored[s] = scales.load(element >>", "stored[s] = scales.load(element + 8 >>"),
]


@pytest.mark.parametrize(("op", "fault", "before", "after"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_planted_fault_is_caught(tmp_path, op, fault, before, after):
    """The emulated tests fail on a kernel with this one change."""
    source = OPS / f"{op}_cuda.cu"
    text = source.read_text()
    assert text.count(before) >= 1, "the kernel has changed: plant this fault anew"
    mutated = emulation.BUILD / "faults" / source.name
    mutated.parent.mkdir(parents=True, exist_ok=True)
    mutated.write_text(text.replace(before, after, 1))
    emulation.build("mutant", mutant=tuple(mutated if s == source else s for s in OPS.glob("*_cuda.cu")))
    shutil.copytree(emulation.BUILD / "mutant", tmp_path / "mutant")  # a library of one path is loaded only once
    device = emulation.EmulatedDevice(emulation.load(tmp_path / "mutant"))
    backend = SimpleNamespace(name="emulated_mutant", device=torch.device("cpu"))
    with dispatch.override(device), emulation.fresh_outputs(), pytest.raises((AssertionError, RuntimeError)):
        SUITES[op](backend)


def test_unchanged_kernels_pass_the_suites():
    """Or the planted faults would prove nothing."""
    backend = SimpleNamespace(name="emulated_checked", device=torch.device("cpu"))
    for suite in SUITES.values():
        with dispatch.override(emulation.device("checked")), emulation.fresh_outputs():
            suite(backend)


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
