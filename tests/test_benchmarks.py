"""A rehearsal of the benchmarks on small shapes: those for a GPU on the emulated one, and the large runs on a CPU."""

import importlib.util
import json
import math
import os
import subprocess
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
    assert own == {"tiny", "describe", "synchronize", "seconds", "graph"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    gpu = machine.Gpu()
    gpu.tiny = True
    assert run.run(gpu, list(run.NAMES), 1, None)


LARGE_RUNS = """
import sys
from benchmarks import __main__, bench_decode, bench_step, growth, load, memory, models, scale, shards

out = sys.argv[1]
shards.SIZES["tiny"] = load.TINY | {"num_hidden_layers": 2, "tie_word_embeddings": True}
tiny = ["tiny", "--directory", f"{out}/tiny", "--json"]
scale.main([*tiny, f"{out}/scale.json", "--tokens", "8", "--steps", "3", "--threads", "1", "--r", "4"])
load.main([*tiny, f"{out}/load.json", "--rounds", "1"])
growth.START = {"length": 4, "layers": 1, "batch": 1, "rank": 2}
growth.DOUBLINGS, growth.STEPS, growth.VOCABULARY = 2, 1, 64
growth.main(["--json", f"{out}/growth.json", "--plot", f"{out}/growth.svg"])
models.SMOLLM2_135M.update(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
models.SMOLLM2_135M.update(num_attention_heads=4, num_key_value_heads=2)
bench_step.CASES = [(1, 5, "fp32", bench_step.BEST), (2, 5, "bf16", bench_step.PLAIN)]
bench_step.MANY = 9
bench_decode.TOKENS = 2
for name, case in (("step", ""), ("decode", "fp32"), ("decode", "bf16")):
    __main__.main([name, "--case", case, "--device", "cpu", "--rounds", "2", "--json", f"{out}/cpu.json"])
memory.BATCH, memory.LENGTH = 1, 5
memory.main(["--json", f"{out}/memory.json"])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("large")
    (out / "benchmarks").symlink_to(emulation.ROOT / "benchmarks")  # the checkout's pyqlora may lack the extension
    command = [sys.executable, "-c", LARGE_RUNS, str(out)]
    without_gpus = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # one of these imports counts them before any is run
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=without_gpus)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scale(large):
    out, printed = large
    result = json.loads((out / "scale.json").read_text())
    names = [
        "load",
        "adapter",
        *(f"step {n}: {part}" for n in (1, 2, 3) for part in ("forward", "backward", "optimizer")),
    ]
    assert [part["name"] for part in result["parts"]] == names
    assert all(0 < part["before"] <= part["peak"] >= part["after"] > 0 for part in result["parts"])
    assert result["peak"] == max(part["peak"] for part in result["parts"])
    assert result["losses"][2] < result["losses"][0] and math.isclose(result["losses"][0], math.log(64), rel_tol=0.1)
    assert all(f"| {name} |" in printed for name in names) and "estimated peak: " in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load(large):
    out, _ = large
    result = json.loads((out / "load.json").read_text())
    assert len(result["rounds"]) == 6 and {len(samples) for samples in result["rounds"].values()} == {1}
    allowed = {name: samples[0].get("allowed") for name, samples in result["rounds"].items()}
    assert allowed["bf16 to NF4: pyqlora"] == allowed["bf16 to NF4: bitsandbytes"] == allowed["from NF4: pyqlora"]
    assert 0 < result["bytes"]["from"] < result["bytes"]["bf16"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth(large):
    out, printed = large
    axes = json.loads((out / "growth.json").read_text())["axes"]
    assert {len(points) for points in axes.values()} == {3} and len(
        {json.dumps(points[0]) for points in axes.values()}
    ) == 1
    assert printed.count("| length |") == 2 and (out / "growth.svg").read_text().count("from 4") == 1


def test_steps_and_decoding(large):
    out, printed = large
    results = json.loads((out / "cpu.json").read_text())
    step, decode = results["step"]["results"], results["decode"]["results"]
    assert results["step"]["machine"]["threads"] == "1"
    assert [case["case"] for case in step] == ["step 1x5 fp32, each at its best", "step 2x5 bf16, plain checkpointing"]
    assert [sorted(case["runs"]) for case in step] == [
        ["bitsandbytes", "pyqlora", "torch dense"],
        ["bitsandbytes", "pyqlora"],
    ]
    assert step[1]["runs"]["bitsandbytes"]["rounds"] == 1 and step[1]["runs"]["pyqlora"]["rounds"] == 2
    assert all(0 < run["cpu_ms_min"] <= run["cpu_ms"] for case in step + decode for run in case["runs"].values())
    assert [case["case"] for case in decode] == ["decode 2 tokens fp32", "decode 2 tokens bf16, bitsandbytes fp32"]
    assert "| step 1x5 fp32, each at its best |" in printed


def test_a_case_that_is_not_there(tmp_path):
    from benchmarks import __main__

    arguments = ["quantize", "--case", "of old", "--device", "cpu", "--json", str(tmp_path / "cpu.json")]
    with pytest.raises(SystemExit, match="no case of quantize has 'of old' in its name"):
        __main__.main(arguments)
    assert not list(tmp_path.iterdir())


def test_memory(large):
    out, printed = large
    added = json.loads((out / "memory.json").read_text())
    assert len(added) == 5 and all(size >= 0 for size in added.values())
    assert all(f"| {name} |" in printed for name in added)


def test_reports_of_results(tmp_path):
    from benchmarks import report

    file, results, readme = (tmp_path / name for name in ("cpu.json", "RESULTS.md", "README.md"))
    place = "before\n<!-- measured: {} -->\nold\n<!-- end -->\nafter\n"
    results.write_text(place.format("optim"))
    readme.write_text(place.format("optimizers") + place.format("steps"))
    wanted, one = report.TABLES["optimizers"].cases, {"threads": "1"}

    def run(ms):
        return {"cpu_ms": ms, "cpu_ms_min": ms, "cpu_ms_max": ms, "wall_ms": ms / 2, "rounds": 3}

    cases = [{"case": case, "runs": {"pyqlora": run(1234.5), "torch dense": run(617)}} for case in wanted]
    cases[0]["runs"]["bitsandbytes"] = run(24690)
    report.keep(file, "optim", one | {"CPU": "one"}, [cases[0], {"case": cases[1]["case"], "runs": {}}])
    report.keep(file, "optim", one | {"CPU": "another"}, cases[1:])
    assert list(json.loads(file.read_text())) == ["optim"] and not (tmp_path / "cpu.tmp").exists()
    report.write(file, results, readme)
    assert "CPU: another\n" in results.read_text() and "old" not in results.read_text()
    table, rest = readme.read_text().split("after", 1)
    assert "| AdamW8bit | 1,234 | 24,690 | 20× | 617 | 0.5× |\n" in table
    assert "| PagedAdamW8bit | 1,234 | – | – | 617 | 0.5× |\n" in table
    assert rest == "\n" + place.format("steps")  # not all of its cases were measured
    report.keep(file, "decode", one, [])
    with pytest.raises(ValueError, match=r"RESULTS.md: no place for the table: <!-- measured: decode -->"):
        report.write(file, results, readme)


def test_reports_of_two_threads(tmp_path):
    """Beside those of one, with the wall's times."""
    from benchmarks import report

    file, results, readme = (tmp_path / name for name in ("cpu.json", "RESULTS.md", "README.md"))
    names = [report.part("step", threads) for threads in (1, 2)]
    results.write_text("".join(f"<!-- measured: {name} -->\n<!-- end -->\n" for name in names))
    readme.write_text("<!-- measured: threads -->\n<!-- end -->\n")
    for threads, name in enumerate(names, 1):
        runs = {
            implementation: {"cpu_ms": ms, "cpu_ms_min": ms, "cpu_ms_max": ms, "wall_ms": ms / threads**2, "rounds": 1}
            for implementation, ms in (("pyqlora", 8.0), ("bitsandbytes", 32.0))
        }
        machine, cases = {"threads": str(threads)}, report.TABLES["threads"].cases
        report.keep(file, name, machine, [{"case": case, "runs": runs} for case in cases])
    report.write(file, results, readme)
    first, second = results.read_text().split("<!-- end -->\n", 1)
    assert "| step 4x256 fp32, each at its best | 8 | 8–8 | 8 | 32 | 4.0x | – | – |\n" in first
    assert "| step 4x256 fp32, each at its best | 8 | 2 | 32 | 8 | 4.0x | 4.0x | – | – | – | – |\n" in second
    for text in (first, second):
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| training step, 4×256 tokens, fp32, each at its best | 2 | 8 | 4.0× | – | – |\n" in readme.read_text()


def test_the_tables_are_those_of_the_results(tmp_path):
    from benchmarks import report

    copies = [tmp_path / "RESULTS.md", tmp_path / "README.md"]
    originals = [report.RESULTS, report.README]
    for copy, original in zip(copies, originals, strict=True):
        copy.write_text(original.read_text())
    report.write(report.HERE / "avx2.json", *copies)
    assert [c.read_text() for c in copies] == [o.read_text() for o in originals]


def test_growth_of_a_line_and_a_parabola():
    from benchmarks.growth import growth

    assert growth([5 + 3 * x for x in (1, 2, 4, 8)]) == 2
    assert growth([5 + 3 * x * x for x in (1, 2, 4, 8)]) == 4
    assert math.isnan(growth([1, 1, 1]))


def test_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    import tiny_model

    from pyqlora.integrations.gguf_write import write_model

    (tmp_path / "benchmarks").symlink_to(emulation.ROOT / "benchmarks")
    write_model(tiny_model.model(), tiny_model.tokenizer(), tmp_path / "tiny.gguf")
    given = ["tiny.gguf", "--tokens", "2", "--rounds", "2", "--json", "results.json"]
    command = [sys.executable, "-m", "benchmarks.llama_cpp", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "results.json").read_text())["ms a token"]
    assert len(samples) == 12 and {len(times) for times in samples.values()} == {2}
    assert all(f"| {name} |" in done.stdout for name in samples)
