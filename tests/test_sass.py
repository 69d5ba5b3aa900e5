"""What ptxas makes of the kernels, per architecture: needs nvcc, and for the instructions nvdisasm; no GPU."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SOURCES = sorted((CSRC / "ops").glob("*_cuda.cu"))
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
NVDISASM = shutil.which("nvdisasm") or next(
    (str(p) for folder in sys.path for p in Path(folder).glob("nvidia/cu*/bin/nvdisasm")), None
)
REGISTERS = 128  # a thread; with 512 threads a CUDA block


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compiled(request, tmp_path_factory):
    """{operation: (cubin, ptxas' report)} for one architecture."""
    if not NVCC:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    result = {}
    for source in SOURCES:
        cubin = folder / f"{source.stem}.cubin"
        command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{request.param}", f"-I{CSRC}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result[source.stem.removesuffix("_cuda")] = cubin, done.stderr
    return result


def instructions(cubin):
    """{kernel: Counter of opcodes, loads and stores with their width}."""
    text = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels, current = {}, None
    for line in text.splitlines():
        if label := re.match(r"\s*\.text\.(\S+):", line):
            current = kernels.setdefault(label[1], collections.Counter())
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            parts = found[1].split(".")
            current[parts[0]] += 1
            current.update(f"{parts[0]}.{width}" for width in ("128", "64") if width in parts)
    return kernels


def test_no_spills_and_few_registers(compiled):
    for operation, (_, report) in compiled.items():
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
        assert spills and not any(spills), f"{operation}: {report}"
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= REGISTERS, operation


def test_quantize_moves_16_bytes_at_a_time(compiled):
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    for kernel, count in instructions(compiled["quantize"][0]).items():
        assert not count["LDL"] and not count["STL"], f"{kernel}: local memory"
        assert count["STG.128"] if "dequantize" in kernel else count["LDG.128"], f"{kernel}: no 16-byte accesses"


def test_dequantize_stays_within_its_budget(compiled, request):
    """Instructions per weight at which memory, not issue, is the limit. A thread's tile is 32 weights."""
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    budget = 60 if "sm_75" in request.node.name else 22
    for kernel, count in instructions(compiled["quantize"][0]).items():
        if "dequantize_4bit" in kernel:
            assert sum(n for name, n in count.items() if "." not in name) < budget * 32, kernel
