"""`python -m benchmarks.image [80 90 ...]`: what each architecture costs: nvcc's CPU time for all kernels and the bytes
that its machine code adds to the extension. Needs nvcc, no GPU.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


def image(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[float, int]:
    """CPU seconds, and bytes of compressed machine code, of one file for one architecture."""
    fat = folder / f"{source.stem}.fatbin"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", code, "-Xfatbin=-compress-all", "-fatbin", "-o", fat, source]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, fat.stat().st_size


def main() -> None:
    nvcc = os.environ.get("CUDACXX", "nvcc")
    print("| architecture | CPU seconds | KiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in sys.argv[1:] or ARCHITECTURES:
            costs = [image(nvcc, s, architecture, Path(folder)) for s in sorted((CSRC / "ops").glob("*_cuda.cu"))]
            seconds, size = (sum(column) for column in zip(*costs, strict=True))
            print(f"| sm_{architecture} | {seconds:.0f} | {size / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
