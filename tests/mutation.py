"""The mutation check: `python tests/mutation.py [WORD ...]` plants each fault of tests/faults in the CUDA kernels, runs
their tests on the checked emulation, and prints which test noticed. WORDs choose faults whose row holds one of them.

The exit status is the number of faults that nothing noticed. A fault costs one compilation and one test run, some
20 s; tests/test_emulation.py runs a few of them with all other tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import emulation
from faults import Fault

TESTS = Path(__file__).resolve().parent
CSRC = emulation.ROOT / "csrc"
KERNELS = sorted(p.stem for p in (TESTS / "faults").glob("[!_]*.py"))


def faults(kernel: str) -> list[Fault]:
    """Those of a module of tests/faults."""
    return importlib.import_module(f"faults.{kernel}").FAULTS


def changed(kernel: str, fault: Fault) -> dict[str, str]:
    """The file that holds the fault, under csrc, and its text with it."""
    file = fault.file or importlib.import_module(f"faults.{kernel}").SOURCE
    text = (CSRC / file).read_text()
    count = text.count(fault.before)
    assert count == 1, f"{kernel}: {fault.what}: {file} holds {fault.before!r} {count} times: plant this fault anew"
    return {file: text.replace(fault.before, fault.after)}


def plant(kernel: str, fault: Fault, folder: Path) -> None:
    """Build the kernels with this fault into `folder`."""
    source = importlib.import_module(f"faults.{kernel}").SOURCE
    emulation.build_changed(source, changed(kernel, fault), folder)


def killer(kernel: str, folder: Path) -> str | None:
    """The first test that fails on the kernels in `folder`, and how; None if all pass."""
    tests = TESTS / importlib.import_module(f"faults.{kernel}").TESTS
    environment = os.environ | {"PYQLORA_EMULATION_CHANGED": str(folder), "COLUMNS": "4000"}
    # The package that this process uses, which may be installed: the source tree need not hold the extension.
    environment["PYTHONPATH"] = str(Path(importlib.util.find_spec("pyqlora").origin).parents[1])
    # Peers, and examples made smaller after a failure, take time and find no more than the reference does.
    command = [sys.executable, "-m", "pytest", "-x", "-rf", "--tb=no", "-p", "no:cacheprovider"]
    command += ["--backend", "emulated_changed", "-k", "not bitsandbytes", tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS)
    if done.returncode == 0:
        return None
    if failure := re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(test_\w+\.py::.*)$", done.stdout, re.MULTILINE):
        return failure[1].replace("emulated_changed-", "").replace("[emulated_changed]", "")
    assert done.returncode < 0, done.stdout + done.stderr
    return f"signal {-done.returncode}"


def main() -> int:
    """Plant the chosen faults one after the other; the number that survived."""
    survived = 0
    print("| kernel | fault | noticed by | as |\n|---|---|---|---|")
    for kernel in KERNELS:
        for fault in faults(kernel):
            if sys.argv[1:] and not any(word in f"{kernel} {fault.what}" for word in sys.argv[1:]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                plant(kernel, fault, Path(folder))
                noticed = killer(kernel, Path(folder))
            survived += noticed is None
            test, _, how = (noticed or "**nothing**").partition(" - ")
            how = re.sub(r"^.*?(?=out-of-bounds|data race|read of uninit|deadlock|divergent|\d+-byte access)", "", how)
            print(f"| {kernel} | {fault.what} | {test.partition('[')[0]} | {how[:90].replace('|', '/')} |", flush=True)
    return survived


if __name__ == "__main__":
    sys.exit(main())
