"""Building with nvcc from PyPI's packages, on a machine without a CUDA toolkit."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

NVIDIA = importlib.util.find_spec("nvidia")
PACKAGED = [
    p for folder in (NVIDIA.submodule_search_locations if NVIDIA else []) for p in Path(folder).glob("cu*/bin/nvcc")
]


@pytest.mark.skipif(
    not PACKAGED, reason="needs nvidia-nvvm and nvidia-cuda-{nvcc,crt,runtime,cccl} of PyPI, all of one version 13.x"
)
def test_nvcc_of_the_packages_compiles_a_kernel(tmp_path):
    folders = os.environ["PATH"].split(os.pathsep)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    environment["PATH"] = os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f))
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    cmake, ninja = emulation.tool("cmake"), emulation.tool("ninja")
    configure = [cmake, "-S", emulation.ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DPYQLORA_CUDA=ON", "-DPYQLORA_CUDA_ARCHS=80-real"]
    done = subprocess.run(configure, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pyqlora: building with CUDA kernels (nvcc 13" in done.stdout and "architectures 80-real)" in done.stdout
    assert str(PACKAGED[0]) in (tmp_path / "CMakeCache.txt").read_text()
    kernel = "CMakeFiles/_C.dir/csrc/ops/quantize_cuda.cu.o"
    done = subprocess.run([ninja, "-C", tmp_path, kernel], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and (tmp_path / kernel).stat().st_size > 0, done.stdout
