"""`python -m benchmarks [quantize linear_4bit ...]`: run benchmarks, print tables, write JSON.

Where torch has a GPU and this build its kernels, the benchmarks are those of benchmarks/gpu, with `dispatch`, which
fits the thresholds between the kernels; else (or with --device cpu) those of the CPU, whose tables in README.md and
RESULTS.md `--readme` writes anew.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks.gpu import run as gpu_benchmarks
from pyqlora import _C

HERE = Path(__file__).parent
CPU_NAMES = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))


def on_cpu(names: list[str], only: str, threads: int, rounds: int, file: Path | None, readme: bool) -> None:
    from benchmarks import harness, report

    if readme:
        file = HERE / f"{_C.cpu.isa()}.json"
    for name in names:
        machine = harness.machine(threads)
        print("\n".join(f"{key}: {value}" for key, value in machine.items()))
        print(f"\n## {name}\n\n{harness.header(threads)}", flush=True)
        results = []
        for case in importlib.import_module(f"benchmarks.bench_{name}").cases():
            if only not in case.name:
                continue
            results.append(harness.measure(case, rounds))
            print(harness.row(results[-1], threads), flush=True)
        if not results:
            raise SystemExit(f"no case of {name} has {only!r} in its name")
        if file:
            report.keep(file, report.part(name, threads), machine, results)
    if readme:
        report.write(file)


def on_gpu(names: list[str], rounds: int, file: Path | None) -> None:
    from benchmarks.gpu import dispatch, machine

    gpu = machine.Gpu()
    gpu_benchmarks.run(gpu, [name for name in names if name != "dispatch"], rounds, file)
    if "dispatch" in names:
        print("\n## dispatch\n")
        dispatch.refit(gpu, rounds)


def main(given: list[str] | None = None) -> None:
    device = "cuda" if _C.with_cuda and torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="pyqlora beside its peers, interleaved.")
    names = {"cpu": CPU_NAMES, "cuda": [*gpu_benchmarks.NAMES, "dispatch"]}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names[device])}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    parser.add_argument("--case", default="", metavar="TEXT", help="on a CPU: only cases with this in their names")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1: compare CPU time)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median is reported")
    parser.add_argument("--json", type=Path, help="write the machine and every result here, beside what is there")
    parser.add_argument("--readme", action="store_true", help="of a checkout, on a CPU: keep the results, renew tables")
    arguments = parser.parse_args(given)
    known = names[arguments.device]
    if unknown := set(arguments.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.device == "cuda":
        on_gpu(arguments.names or known, arguments.rounds, arguments.json)
    else:
        names = arguments.names or known
        on_cpu(names, arguments.case, arguments.threads, arguments.rounds, arguments.json, arguments.readme)


if __name__ == "__main__":
    main()
