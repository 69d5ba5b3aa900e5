"""Which GPUs this machine has, and whether this build's kernels run on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

OLDEST_DRIVER = {12: 525, 13: 580}  # of a CUDA toolkit's major version
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver presents it; `capability` is 90 for compute capability 9.0."""

    name: str
    capability: int
    driver: str


@dataclass(frozen=True)
class Build:
    """What the extension was compiled for: CMake's architectures ("90-real" code, "90" code and PTX, "90-virtual" PTX)
    and the toolkit's version; without CUDA kernels, both empty."""

    architectures: tuple[str, ...]
    toolkit: str


def installed_build() -> Build:
    """That of this installation."""
    from pyqlora import _C

    return Build(tuple(_C.cuda_architectures.split()), _C.cuda_toolkit)


def driver_version() -> str:
    """The NVIDIA driver's, as "580.65.06", or "" where there is none."""
    found = re.search(r"Module.*?(\d+\.\d+(?:\.\d+)?)", _DRIVER.read_text()) if _DRIVER.exists() else None
    return found[1] if found else ""


def visible_gpus() -> list[Gpu]:
    """Those that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, p.major * 10 + p.minor, driver_version() or "unknown") for p in properties]


def kernels_on(gpu: Gpu, build: Build) -> tuple[bool, str]:
    """Whether the build's kernels run on a GPU, and how, or what to do."""
    if not build.architectures:
        return False, "this build has no CUDA kernels: reinstall pyqlora where nvcc is on PATH"
    needed = OLDEST_DRIVER.get(int(build.toolkit.split(".")[0]), 0)
    driver = re.match(r"\d+", gpu.driver)
    if driver and int(driver[0]) < needed:
        return False, f"the driver is too old for this build (CUDA {build.toolkit}): update it to {needed} or newer"
    code, ptx = set(), set()
    for architecture in build.architectures:
        number, _, kind = architecture.partition("-")
        if kind != "virtual":
            code.add(int(number))
        if kind != "real":
            ptx.add(int(number))
    native = [a for a in code if a // 10 == gpu.capability // 10 and a <= gpu.capability]
    if native:
        return True, f"this build's kernels run on it (machine code of sm_{max(native)})"
    older = [a for a in ptx if a <= gpu.capability]
    if older:
        return True, f"this build's kernels run on it (PTX of sm_{max(older)}, compiled by the driver at first use)"
    if gpu.capability < 75:
        return False, "the GPU is too old: the kernels need sm_75 (Turing) or newer"
    remedy = f"rebuild with -DPYQLORA_CUDA_ARCHS={gpu.capability}"
    return False, f"this build has kernels for {', '.join(f'sm_{a}' for a in sorted(code | ptx))} only: {remedy}"


def verdict(gpus: list[Gpu], build: Build, isa: str, driver: str, torch_has_cuda: bool) -> str:
    """One line: what pyqlora will run on here."""
    cpu = f"CPU with {isa} kernels"
    if gpus:
        said = []
        for gpu in dict.fromkeys(gpus):
            runs, why = kernels_on(gpu, build)
            count = f"{gpus.count(gpu)} x " if gpus.count(gpu) > 1 else ""
            where = "GPU" if runs else f"{cpu}, not the GPU"
            said.append(f"{where}: {count}{gpu.name} (sm_{gpu.capability}, driver {gpu.driver}): {why}")
        return "; ".join(said)
    if not driver:
        return f"{cpu}: no NVIDIA driver on this machine"
    if not torch_has_cuda:
        return f"{cpu}: NVIDIA driver {driver} is here, but this torch is a CPU build: install one with CUDA"
    return f"{cpu}: NVIDIA driver {driver} is here, but torch sees no GPU: check CUDA_VISIBLE_DEVICES and the driver"
