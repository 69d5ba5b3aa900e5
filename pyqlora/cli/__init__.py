"""The command line: `pyqlora VERB`, one verb per file."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `pyqlora` command; exits with 0, 1 after an error, or 130 when interrupted."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit('error: the command line needs more packages: pip install "pyqlora[train]"')
    from pyqlora.cli.app import run

    sys.exit(run(sys.argv[1:]))
