import re

import pytest

pytest.importorskip("typer")

from pyqlora.cli import gpus
from pyqlora.cli.gpus import Build, Gpu

ALL = Build(("75-real", "80", "86-real", "89-real", "90-real", "100-real", "120"), "13.0")


@pytest.mark.parametrize(
    ("name", "capability", "driver", "build", "runs", "says"),
    [
        ("NVIDIA H200", 90, "580.65.06", ALL, True, "machine code of sm_90"),
        ("Tesla T4", 75, "580.65.06", ALL, True, "machine code of sm_75"),
        ("GeForce RTX 3090", 86, "580.65.06", ALL, True, "machine code of sm_86"),
        ("NVIDIA GB300", 103, "590.1", ALL, True, "machine code of sm_100"),
        ("of the future", 130, "unknown", ALL, True, "PTX of sm_120, compiled by the driver at first use"),
        ("NVIDIA Thor", 110, "580.65.06", ALL, True, "PTX of sm_80, compiled by the driver at first use"),
        ("Tesla V100", 70, "580.65.06", ALL, False, "the GPU is too old: the kernels need sm_75"),
        ("NVIDIA H200", 90, "550.54.15", ALL, False, "the driver is too old for this build .*13.0.*: update it to 580"),
        ("NVIDIA H200", 90, "550.54.15", Build(("90-real",), "12.9"), True, "machine code of sm_90"),
        ("NVIDIA L4", 89, "580.65.06", Build(("90-real", "100-real"), "13.0"), False, "sm_90, sm_100 only: .*ARCHS=89"),
        ("NVIDIA L4", 89, "580.65.06", Build(("80-virtual",), "13.0"), True, "PTX of sm_80"),
        ("NVIDIA L4", 89, "580.65.06", Build((), ""), False, "no CUDA kernels: reinstall pyqlora where nvcc"),
    ],
)
def test_verdict_on_a_gpu(name, capability, driver, build, runs, says):
    gpu = Gpu(name, capability, driver)
    line = gpus.verdict([gpu], build, "avx2", driver, True)
    assert line.startswith(
        f"{'GPU' if runs else 'CPU with avx2 kernels, not the GPU'}: {name} (sm_{capability}, driver"
    )
    assert "\n" not in line
    assert re.search(says, line), line


def test_verdict_on_several():
    old, new = Gpu("Tesla P100", 60, "580.65"), Gpu("NVIDIA A100", 80, "580.65")
    line = gpus.verdict([new, new, old], ALL, "avx2", "580.65", True)
    assert line.startswith("GPU: 2 x NVIDIA A100 (sm_80") and "; CPU with avx2 kernels, not the GPU: Tesla P100" in line


@pytest.mark.parametrize(
    ("driver", "torch_has_cuda", "says"),
    [
        ("", True, "no NVIDIA driver on this machine"),
        ("580.65", False, "NVIDIA driver 580.65 is here, but this torch is a CPU build: install one with CUDA"),
        ("580.65", True, "NVIDIA driver 580.65 is here, but torch sees no GPU"),
    ],
)
def test_verdict_without_a_gpu(driver, torch_has_cuda, says):
    line = gpus.verdict([], ALL, "avx512", driver, torch_has_cuda)
    assert line.startswith("CPU with avx512 kernels: ") and says in line


def test_driver_version(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(gpus, "_DRIVER", file)
    assert gpus.driver_version() == ""
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC")
    assert gpus.driver_version() == "580.65.06"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024")
    assert gpus.driver_version() == "550.54.15"
