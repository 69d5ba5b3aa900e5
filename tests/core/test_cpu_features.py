"""The choice of the instruction set, and PYQLORA_CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyqlora import _C

# The extension alone, without the seconds that importing torch takes.
CODE = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_C", {_C.__file__!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu.isa())
"""


def isa_of_new_process(forced):
    environment = {**os.environ, "PYQLORA_CPU": forced}
    return subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _C.cpu.set_isa("")


def test_supported_sets_ascend_from_scalar():
    supported = _C.cpu.supported_isas()
    assert supported[0] == "scalar"
    assert supported == [isa for isa in ("scalar", "avx2", "avx512") if isa in supported]


def test_the_best_one_is_the_default(monkeypatch):
    monkeypatch.delenv("PYQLORA_CPU", raising=False)
    _C.cpu.set_isa("")
    assert _C.cpu.isa() == _C.cpu.supported_isas()[-1]


@pytest.mark.parametrize("isa", _C.cpu.supported_isas())
def test_pyqlora_cpu_forces_one(isa):
    result = isa_of_new_process(isa)
    assert (result.returncode, result.stdout.strip()) == (0, isa), result.stderr


def test_an_empty_variable_forces_nothing():
    assert isa_of_new_process("").stdout.strip() == _C.cpu.supported_isas()[-1]


def test_an_unknown_one_is_an_error_that_lists_the_others():
    result = isa_of_new_process("avx9")
    known = ", ".join(_C.cpu.supported_isas())
    assert f"ValueError: PYQLORA_CPU: expected one of {known} on this machine, got 'avx9'" in result.stderr
    with pytest.raises(ValueError, match="got 'avx9'"):
        _C.cpu.set_isa("avx9")
