"""The backends that kernel tests run over, as one fixture."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import emulation
import hypothesis
import pytest
import torch

import pyqlora
from pyqlora import _C
from pyqlora.ops import backend as dispatch

# Python puts the working directory before everything else, and in a checkout that is the source tree without its
# extension: processes that tests start must find the pyqlora that is under test here.
os.environ["PYTHONPATH"] = str(Path(pyqlora.__file__).parents[1])

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

BACKENDS = ("cpu", "emulated", "emulated_reverse", "emulated_checked", "cuda")
SPECIAL_BACKENDS = ("emulated_asan", "emulated_changed")

# An example that an emulated kernel takes long over is no failure, and the backend is the same for all examples.
hypothesis.settings.register_profile(
    "pyqlora", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=25
)
hypothesis.settings.load_profile("pyqlora")


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS + SPECIAL_BACKENDS,
        help="run kernel tests on this backend only (repeatable); default: all but cuda where there is no GPU, "
        "emulated_asan, which needs the sanitizers' libraries preloaded, and emulated_changed, which plants faults",
    )


def pytest_configure(config):
    given = config.getoption("--backend")
    emulation.wanted = not given or any(name.startswith("emulated") for name in given)


@pytest.fixture(scope="session", autouse=True)
def outside_of_the_source_tree():
    """Also with pytest-xdist, whose processes must still start where the paths of the command line count from."""
    os.chdir(Path(__file__).parent)


@dataclass(frozen=True)
class Backend:
    """Where a kernel test runs: tensors go to `device`, and the operators then use the kernels under test."""

    name: str
    device: torch.device

    @property
    def emulated(self) -> bool:
        return self.name.startswith("emulated")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or BACKENDS, indirect=True)


@pytest.fixture(params=_C.cpu.supported_isas())
def isa(request):
    """Every instruction set that this machine has, in turn."""
    _C.cpu.set_isa(request.param)
    yield request.param
    _C.cpu.set_isa("")


@pytest.fixture
def backend(request):
    """The same test on CPU kernels, on emulated CUDA kernels (three ways), and on a GPU."""
    name = request.param
    if name == "cuda" and not (torch.cuda.is_available() and _C.with_cuda):
        pytest.skip("no GPU, or a build without CUDA kernels")
    with ExitStack() as stack:
        if name.startswith("emulated"):
            variant = name.partition("_")[2]
            device = emulation.device(variant if variant in ("checked", "asan", "changed") else "fast")
            device.module.set_order("reverse" if variant == "reverse" else "forward")
            device.module.set_copies("early" if variant == "reverse" else "late")
            stack.enter_context(dispatch.override(device))
            stack.enter_context(emulation.fresh_outputs())
        yield Backend(name, torch.device("cuda" if name == "cuda" else "cpu"))
