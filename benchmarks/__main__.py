"""`python -m benchmarks [quantize linear_4bit ...]`: run benchmarks, print tables, write JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from benchmarks import harness

HERE = Path(__file__).parent
NAMES = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="pyqlora beside its peers, interleaved.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1: compare CPU time)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median is reported")
    parser.add_argument("--json", type=Path, help="write every sample here")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    machine = harness.machine(arguments.threads)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    results = []
    for name in arguments.names or NAMES:
        print(f"\n## {name}\n\n{harness.HEADER}", flush=True)
        for case in importlib.import_module(f"benchmarks.bench_{name}").cases():
            result = harness.measure(case, arguments.rounds)
            print(harness.row(result), flush=True)
            results.append({"benchmark": name, **result})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
