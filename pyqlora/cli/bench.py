"""`pyqlora bench`: pyqlora beside its peers on this machine. The benchmarks are the checkout's, which wheels bring."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

PEERS = ("bitsandbytes", "peft")
INSTALLED = Path(__file__).parents[1] / "measuring"  # where a wheel has them; pyproject.toml says so


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which of the benchmarks, all by default.")] = None,
    threads: Annotated[int, typer.Option(help="torch's threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median is reported.")] = 9,
    json: Annotated[str | None, typer.Option(help="Write every sample here.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print tables of pyqlora beside bitsandbytes, PEFT and dense torch, interleaved and checked."""
    sys.path[:0] = ["", str(INSTALLED)]
    if importlib.util.find_spec("benchmarks") is None or importlib.util.find_spec("benchmarks.harness") is None:
        raise FileNotFoundError("the benchmarks are not part of this build: run this in a source checkout")
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"nothing to compare with: pip install {' '.join(missing)}")
    arguments = [*(names or []), "--threads", str(threads), "--rounds", str(rounds)]
    importlib.import_module("benchmarks.__main__").main(arguments + (["--json", json] if json else []))
