"""CUDA kernels without a GPU: builds csrc/emulation once and runs its kernels on host tensors."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"
wanted = True  # False where --backend names no emulated one


def tool(name: str) -> str | None:
    """A program of this Python's environment, which need not be on PATH."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def _run(command: list[Any], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def build(*targets: str) -> None:
    """Compile the kernels for the CPU: `BUILD/<target>/pyqlora_emulation*.so`.

    Skips where no emulated backend is asked for, and where there is no compiler.
    """
    if not wanted:
        pytest.skip("an emulated GPU, with --backend of others only")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("emulating CUDA needs a C++ compiler: none on PATH")
    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake and ninja, "emulating CUDA needs cmake and ninja: pip install 'pyqlora[test]'"
    configure = [cmake, "-S", ROOT / "csrc" / "emulation", "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test runs build once
        for command in (configure, [cmake, "--build", BUILD, "--target", *targets]):
            _run(command)


def build_changed(source: str, texts: dict[str, str], folder: Path) -> None:
    """Into `folder`, the checked build with its .cu file `source` compiled anew after changes to files under csrc.

    `texts`: the changed files, by their path under csrc.
    """
    build("checked")
    for path, text in texts.items():
        changed = folder / "csrc" / path
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(text)
    objects = []
    for step in json.loads((BUILD / "compile_commands.json").read_text()):
        command = shlex.split(step["command"])
        result = command.index("-o") + 1
        if not re.search(r"(^|/)(checked|engine_checked|bindings)\.dir/", command[result]):
            continue
        if Path(step["file"]) != ROOT / "csrc" / source:
            objects.append(BUILD / command[result])
            continue
        command[result] = str(folder / "changed.o")
        command[command.index("-c") + 1] = str(folder / "csrc" / source if source in texts else step["file"])
        options = next(i for i, word in enumerate(command) if word.startswith("-"))  # after a launcher and the compiler
        _run([*command[:options], "-I", folder / "csrc", *command[options:]], cwd=step["directory"])
        compiler = command[options - 1]
    library = folder / "pyqlora_emulation.so"
    _run([compiler, "-shared", "-o", library, folder / "changed.o", *objects])


def load(folder: Path) -> Any:
    """The extension module in a build's folder."""
    (path,) = folder.glob("pyqlora_emulation*.so")
    # pybind11 keeps one module per full name, so that each build needs its own.
    spec = importlib.util.spec_from_file_location(f"{folder}.pyqlora_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def device(name: str) -> EmulatedDevice:
    """The emulated device of a build: fast, checked, asan, or changed: the one of `build_changed` in the folder that
    PYQLORA_EMULATION_CHANGED names."""
    if name == "changed":
        return EmulatedDevice(load(Path(os.environ["PYQLORA_EMULATION_CHANGED"])))
    build(*({"fast", "checked"} | {name}))
    return EmulatedDevice(load(BUILD / name))


class EmulatedDevice:
    """`_C.cuda` over host tensors: each call copies its tensors to device memory, runs, and copies them back.

    Device memory ends flush with an inaccessible page, and what `fresh_outputs` saw being allocated is uninitialised
    there, so that the checked build knows who reads it too early.
    """

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module.cuda, name)

        def call(*args):
            memory = _Memory(self.module)
            try:
                result = function(*memory.upload(args))
                memory.download()
                return result
            finally:
                memory.free()
                self.module.reset()

        return call


class _Memory:
    def __init__(self, module: Any):
        self.module = module
        self.tensors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.pointers: list[int] = []

    def upload(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.upload(v) for v in value)
        if isinstance(value, dict):
            return {key: self.upload(v) for key, v in value.items()}
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        if not value.is_contiguous():  # with what lies between its elements
            span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            return self.upload(value.as_strided((span,), (1,))).as_strided(value.shape, value.stride())
        key = value.data_ptr(), value.nbytes
        if key not in self.tensors:
            self.tensors[key] = value, self._copy(value)
        return self.tensors[key][1]

    def _copy(self, host: torch.Tensor) -> torch.Tensor:
        shift = host.data_ptr() % 16  # a misaligned view stays misaligned
        pointer = self.module.malloc(host.nbytes + shift)
        self.pointers.append(pointer)
        buffer = (ctypes.c_uint8 * host.nbytes).from_address(pointer + shift)
        copy = torch.frombuffer(buffer, dtype=torch.uint8).view(host.dtype).view(host.shape)
        if not hasattr(host, "_fresh") or host._fresh != host._version:
            copy.copy_(host.detach())
            self.module.written_by_host(pointer + shift, host.nbytes)
        return copy

    def download(self) -> None:
        for host, copy in self.tensors.values():
            ctypes.memmove(host.data_ptr(), copy.data_ptr(), host.nbytes)
            if hasattr(host, "_fresh"):
                del host._fresh

    def free(self) -> None:
        for pointer in self.pointers:
            self.module.free(pointer)


@contextmanager
def fresh_outputs():
    """Mark what torch.empty, empty_like and new_empty return, until someone writes to it."""

    def marking(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if not tensor.is_inference():  # those have no version
                tensor._fresh = tensor._version
            return tensor

        return wrapper

    with (
        mock.patch.object(torch, "empty", marking(torch.empty)),
        mock.patch.object(torch, "empty_like", marking(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", marking(torch.Tensor.new_empty)),
    ):
        yield


class Resident:
    """Memory of an emulated GPU for tensors that stay there, as `allocating` makes them: kernels and torch both reach
    it. Freed with this object."""

    def __init__(self, module: Any, index: int = 0):
        self.module, self.index = module, index
        self.pointers: list[int] = []

    def empty(self, size: Any, dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size([size] if isinstance(size, int) else size)
        bytes = max(size.numel() * dtype.itemsize, 1)
        self.pointers.append(self.module.malloc(bytes, self.index))
        buffer = (ctypes.c_uint8 * bytes).from_address(self.pointers[-1])
        return torch.frombuffer(buffer, dtype=dtype, count=size.numel()).view(size) if size.numel() else torch.empty(0)

    def put(self, host: torch.Tensor) -> torch.Tensor:
        tensor = self.empty(host.shape, host.dtype)
        tensor.copy_(host)
        self.module.written_by_host(tensor.data_ptr(), host.nbytes)
        return tensor

    @contextmanager
    def allocating(self):
        """What torch.empty, empty_like and new_empty return is such memory."""

        def like(tensor, size=None, dtype=None, **_):
            return self.empty(tensor.shape if size is None else size, dtype or tensor.dtype)

        with (
            mock.patch.object(torch, "empty", lambda size, dtype=torch.float32, **_: self.empty(size, dtype)),
            mock.patch.object(torch, "empty_like", like),
            mock.patch.object(torch.Tensor, "new_empty", like),
        ):
            yield

    def __del__(self):
        for pointer in self.pointers:
            self.module.free(pointer)
