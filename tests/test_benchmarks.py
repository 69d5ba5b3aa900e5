"""A rehearsal of the GPU benchmarks: every line of them runs on the emulated GPU, on small shapes."""

import importlib.util
import json
import sys

import emulation
import pytest
import torch

sys.path.insert(0, str(emulation.ROOT))
if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("benchmarks are in a checkout only", allow_module_level=True)

from benchmarks.gpu import dispatch, machine, run
from pyqlora.ops import backend as operators


@pytest.fixture
def gpu():
    eager = torch.compiler.set_stance("force_eager")  # bitsandbytes would compile for half a minute
    with operators.override(emulation.device("fast")), eager:
        yield machine.Rehearsal()


@pytest.mark.parametrize("name", run.NAMES)
def test_rehearsal(gpu, name, tmp_path, capsys):
    results = run.run(gpu, [name], 1, tmp_path / "results.json")
    assert results and all(r["runs"]["pyqlora"]["ms"] > 0 for r in results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["GPU"] == "emulated" and written["results"] == results
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(results)
    assert {line.count("|") for line in table} == {10}


def test_peers_are_optional(gpu, monkeypatch):
    for module in list(sys.modules):
        if module.startswith("benchmarks.gpu."):
            for name in ("HAVE_BITSANDBYTES", "HAVE_PEFT"):
                if hasattr(sys.modules[module], name):
                    monkeypatch.setattr(sys.modules[module], name, False)
    for result in run.run(gpu, ["quantize", "lora_linear"], 1, None):
        assert "peer" not in result["runs"]


def test_refit_measures_and_says_what_to_set(gpu, capsys):
    """By a clock on which mma is faster for up to 4 rows and simt for one."""

    def seconds(run):
        run()
        way, rows = run.__defaults__[0].__name__, len(run.__defaults__[1][0])
        return {"mma": rows, "simt": 3 * rows, "dequantize": 4}[way]

    fitted = dispatch.refit(gpu, 3, seconds)
    assert (fitted.mma_rows, fitted.small_mma_rows, fitted.simt_rows) == (4, 4, 1)
    assert "export PYQLORA_LINEAR_4BIT='mma_rows=4 small_mma_rows=4 simt_rows=1'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mma", "rows"), [({1: 1, 2: 1, 4: 3}, 2), ({1: 3, 2: 1, 4: 1}, 0), ({1: 1, 2: 2, 4: 2}, 4), ({}, 0)]
)
def test_last_win(mma, rows):
    times = {m: {"dequantize": 2.0} | ({"mma": mma[m]} if m in mma else {}) for m in (4, 1, 2)}
    assert dispatch.last_win(times, "mma") == rows


def test_the_real_gpu_differs_in_its_clock_alone():
    """What the rehearsal cannot run is this much."""
    own = {name for name in vars(machine.Rehearsal) if not name.startswith("__")}
    assert own == {"tiny", "describe", "synchronize", "seconds"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    gpu = machine.Gpu()
    gpu.tiny = True
    assert run.run(gpu, list(run.NAMES), 1, None)
