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
SOURCES = [*sorted((CSRC / "ops").glob("*_cuda.cu")), CSRC / "emulation" / "probes.cu"]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
NVDISASM = shutil.which("nvdisasm") or next(
    (str(p) for folder in sys.path for p in Path(folder).glob("nvidia/cu*/bin/nvdisasm")), None
)
# A thread, with 256 threads a CUDA block.
REGISTERS = {"linear_4bit_mma": 255, "lora_linear": 255, "lora_backward": 255}
REGISTERS_OF_OTHERS = 128  # with at most 512 threads


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
        if not spills:
            assert operation == "paged", f"{operation} has no kernels"
            continue
        assert not any(spills), f"{operation}: {report}"
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= REGISTERS.get(
            operation, REGISTERS_OF_OTHERS
        ), operation


def test_quantize_moves_16_bytes_at_a_time(compiled):
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    for kernel, count in instructions(compiled["quantize"][0]).items():
        assert not count["LDL"] and not count["STL"], f"{kernel}: local memory"
        assert count["STG.128"] if "dequantize" in kernel else count["LDG.128"], f"{kernel}: no 16-byte accesses"


def test_dequantize_stays_within_its_budget(compiled, request):
    """Instructions per weight at which memory, not issue, is the limit. A thread's tile is 32 weights; the kernel for
    rows also holds a loop for 8."""
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    budget = 60 if "sm_75" in request.node.name else 22
    for kernel, count in instructions(compiled["quantize"][0]).items():
        if "dequantize_4bit" in kernel:
            assert sum(n for name, n in count.items() if "." not in name) < budget * (40 if "rows" in kernel else 32), (
                kernel
            )


def test_optim_step_moves_16_bytes(compiled, request):
    """And needs few instructions for the eight elements that a lane takes at a time, tails and cold paths included."""
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    checked, old = 0, 2 if "sm_75" in request.node.name else 1  # which converts bfloat16 in software
    for kernel, count in instructions(compiled["optim_step"][0]).items():
        if found := re.search(r"optim_step_kernelI\w+?ELb([01])E", kernel):
            quantized = found[1] == "1"
            assert not count["LDL"] and not count["STL"], f"{kernel}: local memory"
            assert count["LDG.128"] >= (2 if quantized else 4), f"{kernel}: narrow loads"
            assert count["STG.128"] >= (1 if quantized else 3), f"{kernel}: narrow stores"
            assert sum(n for name, n in count.items() if "." not in name) < 8 * old * (260 if quantized else 130), (
                kernel
            )
            checked += 1
    assert checked == 36  # rules, dtypes and widths of state


def test_lora_linear_uses_tensor_cores(compiled, request):
    """And 16-byte loads; s is narrow, what else they write goes out 16 bytes at a time."""
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    checked = 0
    for operation in ("lora_linear", "lora_backward"):
        for kernel, count in instructions(compiled[operation][0]).items():
            product = re.search(r"lora_(down|up|backward)_kernel", kernel)
            if not product or ("sm_75" in request.node.name and "bfloat16" in kernel):
                continue
            assert count["HMMA"] and count["LDG.128"], kernel
            assert not count["LDL"] and not count["STL"], f"{kernel}: local memory"
            assert product[1] == "down" or count["STG.128"], f"{kernel}: narrow stores"
            checked += 1
    assert checked == (9 if "sm_75" in request.node.name else 18)


def main_loops(cubin):
    """{kernel: opcodes of its main loop}: of what lies between a backward branch and its target, and holds no other
    such loop (as the ways back from cold blocks behind the kernel's end do), that with the most tensor-core
    instructions."""
    text = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True).stdout
    loops = {}
    for kernel in re.split(r"\n\.text\.", text)[1:]:
        opcodes, labels, found = [], {}, []
        for line in kernel.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                labels[label[1]] = len(opcodes)
            elif opcode := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", line):
                opcodes.append(opcode[1])
                target = re.search(r"\.L_\w+", line)
                if opcode[1] == "BRA" and target and target[0] in labels:
                    found.append((labels[target[0]], len(opcodes)))
        inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
        bodies = [opcodes[start:end] for start, end in inner]
        loops[kernel.partition(":")[0]] = max(bodies, key=lambda loop: (loop.count("HMMA"), -len(loop)), default=[])
    return loops


def test_linear_4bit_stays_within_its_budget(compiled, request):
    """Instructions per weight of the tensor-core kernel for 8, 16, 32 and 64 rows of x."""
    if not NVDISASM:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    old = "sm_75" in request.node.name  # half only, and two instructions where later architectures have one
    budget = {1: 3.9, 2: 4.5, 4: 5.3, 8: 6.8}
    weights = {1: 256, 2: 128, 4: 128, 8: 128}  # a thread's in one turn of the loop
    checked = []
    for kernel, loop in main_loops(compiled["linear_4bit_mma"][0]).items():
        kind = re.search(r"linear_4bit_mma_kernelI(\w+?)Li(\d)E", kernel)
        if kind and not (old and "half" not in kind[1]):
            tiles = int(kind[2])
            assert loop.count("HMMA") == tiles * weights[tiles] // 8 * (2 if old else 1), kernel
            assert not {"LDL", "STL"} & set(loop), f"{kernel}: local memory"
            assert len(loop) <= budget[tiles] * weights[tiles], f"{kernel}: {len(loop)} instructions"
            checked.append(tiles)
    assert sorted(checked) == sorted([1, 2, 4, 8] * (1 if old else 2))
