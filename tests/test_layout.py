"""Rules of the source tree that no compiler checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyqlora import _C
from pyqlora.ops import backend

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh", ".inl"})
PYTHON = sorted((ROOT / "pyqlora").rglob("*.py"))
OPERATIONS = sorted(p.name.removesuffix("_bind.cpp") for p in (CSRC / "ops").glob("*_bind.cpp"))


def matches(files, pattern):
    """file:line of every match."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_inline_ptx_is_in_one_file():
    kernels = [p for p in NATIVE if p.suffix in {".cu", ".cuh"} and p != CSRC / "core" / "ptx.cuh"]
    assert not matches(kernels, r"\basm\b")


def test_kernels_do_without_the_preprocessor_and_the_default_stream():
    """The same source serves nvcc and the emulation, and every launch goes through core/launch.h."""
    kernels = list((CSRC / "ops").glob("*.cu")) + list((CSRC / "ops").glob("*.cuh"))
    assert not matches(kernels, r"^\s*#\s*if|<<<|__shared__|cudaMalloc\b|cudaDeviceSynchronize|cudaStreamSynchronize")


def test_kernels_are_deterministic():
    assert not matches([p for p in NATIVE if p.suffix in {".cu", ".cuh"}], r"\batomic(Add|Sub|CAS|Exch)\b")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_has_its_files(operation):
    """One word at every level."""
    for path in ("csrc/ops/{}.h", "csrc/ops/{}_cpu.cpp", "pyqlora/ops/{}.py"):
        assert (ROOT / path.format(operation)).exists(), path.format(operation)
    assert f"bind_{operation}(" in (CSRC / "ops" / "bind.h").read_text()


def test_native_code_neither_prints_nor_exits():
    library = [p for p in NATIVE if (CSRC / "emulation") not in p.parents]
    assert not matches(library, r"\bprintf\(|std::cout|std::cerr|\bexit\(|\babort\(|\bassert\(")


def test_only_the_operators_import_the_extension():
    """And what reports on the machine: the command line and the plan of a run."""
    allowed = {ROOT / "pyqlora" / folder for folder in ("ops", "cli", "finetune")}
    others = [p for p in PYTHON if p.parent not in allowed]
    assert not matches(others, r"^\s*(from pyqlora import _C|import pyqlora\._C|from pyqlora\._C)")


def test_files_are_short():
    long = {p: len(p.read_text().splitlines()) for p in NATIVE + PYTHON}
    assert not {str(p.relative_to(ROOT)): n for p, n in long.items() if n > 500}


def test_no_pickle():
    """But for PEFT's adapter_model.bin, which the stand-in writes when told to and reads as tensors only."""
    own = [p for p in PYTHON if p.name != "peft_behaviour.py"]
    assert not matches(own, r"^\s*(import|from) pickle|torch\.(save|load)\(")
    assert not matches(PYTHON, r"weights_only=False")


def test_no_machine_paths():
    files = [p for p in NATIVE + PYTHON + sorted((ROOT / "tests").rglob("*.py")) if p != Path(__file__)]
    assert not matches(files, r"/(home|root|work|Users)/\w|[A-Z]:\\\\Users|(?<!\w)/tmp/\w")


def run_python(code):
    """In a fresh interpreter without a GPU; (stdout + stderr, exit code)."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error::ImportWarning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr, done.returncode


def test_importing_prints_nothing_and_stays_light():
    heavy = "transformers, accelerate, peft, bitsandbytes, datasets, typer, rich, matplotlib, gguf"
    code = f"import sys, pyqlora; assert not set(sys.modules) & set('{heavy}'.split(', ')), 'heavy import'"
    assert run_python(code) == ("", 0)


def test_emulation_is_not_in_the_wheel():
    configuration = (ROOT / "CMakeLists.txt").read_text()
    assert "emulation" not in configuration
    packages = (ROOT / "pyproject.toml").read_text().split("[tool.scikit-build.wheel.packages]\n")[1].split("\n\n")[0]
    assert [line.split('"')[3] for line in packages.splitlines()] == ["pyqlora", "benchmarks"]


def test_a_gpu_tensor_without_cuda_kernels_names_the_remedy():
    if _C.with_cuda:
        pytest.skip("this build has CUDA kernels")
    assert not [name for name in dir(_C.cuda) if not name.startswith("_")]
    with FakeTensorMode(), pytest.raises(RuntimeError, match="no CUDA kernels: reinstall it where nvcc is on PATH"):
        backend.native(torch.empty(1, device="cuda"))
