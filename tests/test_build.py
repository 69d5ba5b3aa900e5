"""Building with nvcc from PyPI's packages, on a machine without a CUDA toolkit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

# The Python beside which they are: README.md gives them an environment of their own.
TOOLCHAIN = os.environ.get("PYQLORA_TOOLCHAIN", sys.executable)


def packaged_nvcc():
    code = "import nvidia; print(*nvidia.__path__, sep='\\n')"
    done = subprocess.run([TOOLCHAIN, "-c", code], capture_output=True, text=True)
    folders = done.stdout.splitlines() if done.returncode == 0 else []
    return [p for folder in folders for p in Path(folder).glob("cu*/bin/nvcc")]


def configure(folder, python, *options, **environment):
    """CMake where no nvcc is on PATH."""
    folders = os.environ["PATH"].split(os.pathsep)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")} | environment
    environment["PATH"] = os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f))
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    cmake, ninja = emulation.tool("cmake"), emulation.tool("ninja")
    if not cmake or not ninja:
        pytest.skip("needs cmake and ninja: pip install 'pyqlora[test]'")
    command = [cmake, "-S", emulation.ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
    command += [f"-DPython_EXECUTABLE={python}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment), environment


def test_nvcc_of_the_packages_compiles_a_kernel(tmp_path):
    if not (packaged := packaged_nvcc()):
        pytest.skip("needs nvidia-nvvm and nvidia-cuda-{nvcc,crt,runtime,cccl} of PyPI, all of one version 13.x")
    done, environment = configure(tmp_path, TOOLCHAIN, "-DPYQLORA_CUDA=ON", "-DPYQLORA_CUDA_ARCHS=80-real")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pyqlora: building with CUDA kernels (nvcc 13" in done.stdout and "architectures 80-real)" in done.stdout
    assert str(packaged[0]) in (tmp_path / "CMakeCache.txt").read_text()
    kernel = "CMakeFiles/_C.dir/csrc/ops/quantize_cuda.cu.o"
    command = [emulation.tool("ninja"), "-C", tmp_path, kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and (tmp_path / kernel).stat().st_size > 0, done.stdout


def test_a_runtime_of_another_version_is_refused(tmp_path):
    """As where torch, installed later, has raised it."""
    toolkit = tmp_path / "nvidia" / "cu13"
    for folder in ("bin", "include"):
        (toolkit / folder).mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    (toolkit / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13020\n")
    done, _ = configure(tmp_path / "build", sys.executable, PYTHONPATH=str(tmp_path))
    said = " ".join(done.stderr.split())
    assert done.returncode and "nvidia-cuda-nvcc 13.0 stands beside nvidia-cuda-runtime 13.2" in said, said
