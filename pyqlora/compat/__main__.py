"""python -m pyqlora.compat SCRIPT [ARGS]: run a script written for bitsandbytes or PEFT on pyqlora."""

import os
import runpy
import sys

from pyqlora.compat import install


def main() -> None:
    """Run the script named by the first argument as `python SCRIPT [ARGS]` would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: python -m pyqlora.compat SCRIPT [ARGS]")
    script = sys.argv[1]
    if not os.path.exists(script):
        sys.exit(f"pyqlora.compat: {script}: no such script")
    install()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
